"""Where a call's time goes: kernels by class and part, from traces as torch.profiler writes them."""

import csv
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_fast import graphs, pipeline, profile, roofline, spool
from tests.conftest import planned

Event = dict[str, Any]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNT", "linear"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_tn_align8>", "linear"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "linear"),
        ("nvjet_sm90_qqtst_128x128_128x6_1x2_h_bz_ovscale_bias_TNT", "linear"),
        ("nvjet_sm90_tst_64x40_64x16_4x2_h_bz_splitK_bias_TNT", "linear"),
        ("_matmul_kernel", "linear"),
        ("triton_tem_fused_addmm_7", "linear"),
        ("triton_tem_fused_mm_0", "linear"),
        ("triton_tem_fused__int_mm_add_mul_2", "linear"),
        ("triton_tem_fused_addmm_native_layer_norm_view_5", "linear"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>", "linear"),
        ("sm90_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x128_warpgroupsize1x1x1", "linear"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        (
            "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x128_64x3>",
            "convolution",
        ),
        (
            "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_"
            "warpgroupsize1x1x1_g1_execute_segment_k_on_kernel__5x_cudnn",
            "convolution",
        ),
        ("_convolution_kernel", "convolution"),
        ("triton_tem_fused_convolution_12", "convolution"),
        ("triton_tem_fused_convolution_native_group_norm_silu_12", "convolution"),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1_kernel0_0",
            "attention",
        ),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<>::Params)", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("triton_tem_fused_bmm_3", "attention"),  # as operations are counted: batched matmuls are attention's
        ("triton_tem_fused_baddbmm_mul_3", "attention"),
        ("triton_per_fused__softmax__to_copy_mul_4", "attention"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false, false>", "attention"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>", "norm"),
        (
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>",
            "norm",
        ),
        ("_layer_norm_quantize_rows_kernel", "norm"),
        ("_group_norm_silu_kernel", "norm"),
        ("_group_norm_quantize_image_kernel", "norm"),
        ("triton_red_fused__to_copy_native_group_norm_silu_4", "norm"),
        ("triton_red_fused_clone_convolution_native_group_norm_silu_46", "norm"),
        ("triton_per_fused_add_clone_convolution_div_native_group_norm_silu_35", "norm"),
        ("triton_poi_fused_clone_native_group_norm_silu_4", "norm"),
        ("triton_red_fused_add_div_native_layer_norm_view_1", "norm"),
        (
            "triton_red_fused__to_copy_abs_amax_clamp_div_mul_native_layer_norm_reciprocal_scaled_matmul_view_0",
            "norm",
        ),
        ("triton_red_fused_addmm_var_mean_2", "norm"),
        ("triton_per_fused_add_native_layer_norm_11", "norm"),
        ("triton_poi_fused_gelu_mul_split_9", "pointwise"),
        ("triton_poi_fused_gelu_mul_split_view_3", "pointwise"),
        ("triton_poi_fused_silu_0", "pointwise"),
        ("triton_poi_fused_convolution_5", "pointwise"),  # its bias
        ("triton_poi_fused_add_addmm_view_5", "pointwise"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_1", "pointwise"),
        ("triton_poi_fused__to_copy_add_clone_2", "pointwise"),
        ("triton_red_fused__to_copy_abs_amax_clamp_scaled_matmul_view_8", "pointwise"),
        ("triton_for_fused_mul_0", "pointwise"),
        ("triton_unk_fused_mm_sum_1", "pointwise"),  # a category that Inductor has no name for
        ("triton_", "pointwise"),  # where Inductor's kernels have no names of their own
        ("_geglu_quantize_rows_kernel", "pointwise"),
        ("_quantize_rows_kernel", "pointwise"),
        ("_image_amax_kernel", "pointwise"),
        ("_quantize_image_kernel", "pointwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "pointwise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda()>", "copies"),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<"
            "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>>",
            "copies",
        ),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::FillFunctor<c10::BFloat16>>", "copies"),
        ("triton_poi_fused__to_copy_3", "copies"),
        ("triton_poi_fused__unsafe_view_clone_transpose_view_11", "copies"),
        ("triton_poi_fused_cat_constant_pad_nd_split_with_sizes_2", "copies"),
        ("triton_for_fused_copy_0", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("nchwToNhwcKernel", "copies"),
        ("aten::addmm", "linear"),
        ("aten::bmm", "attention"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::native_layer_norm", "norm"),
        ("aten::transpose", "other"),
        ("aten::mul", "pointwise"),
        ("something_never_seen", "other"),
    ],
)
def test_a_kernel_has_a_class_by_its_name(name: str, kind: str) -> None:
    assert profile.classify(name) == kind


def test_each_kernel_of_ours_has_a_class() -> None:
    names = re.findall(
        r"^def (_\w+_kernel)\(", (Path(profile.__file__).parent / "kernels.py").read_text(), re.MULTILINE
    )
    assert "_matmul_kernel" in names
    assert [name for name in names if profile.classify(name) == "other"] == []


def marked(part: str, start: float, end: float) -> Event:
    return {"ph": "X", "cat": "user_annotation", "name": f"diffusion_fast:{part}", "ts": start, "dur": end - start}


def launched(number: int, name: str, start: float, busy: float, operator: str, **args: Any) -> list[Event]:
    """An operator on the CPU, long over when its kernel runs."""
    cpu = {"ph": "X", "cat": "cpu_op", "name": operator, "ts": start - 50, "dur": 2, "tid": 1}
    gpu = {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": busy, "tid": 7}
    return [cpu | {"args": {"External id": number, **args}}, gpu | {"args": {"External id": number, "stream": 7}}]


def test_a_gpus_time_is_told_by_part_and_class() -> None:
    """Two steps lie between three of the scheduler's: in each 300 µs of matmul, 100 of which another kernel shares."""
    events = [marked("scheduler", end - 10, end) for end in (1000, 2000, 3000)] + [marked("vae_decode", 3100, 4100)]
    moved = {"Input Dims": [[1000, 1000], [1000, 1000], []], "Input type": ["c10::BFloat16", "c10::BFloat16", "Scalar"]}
    for step, start in enumerate((1000, 2000)):
        events += launched(10 * step + 1, "nvjet_tst", start + 100, 300, "aten::addmm")
        events += launched(10 * step + 2, "triton_poi_fused_mul_0", start + 300, 200, "triton_poi_fused_mul_0", **moved)
        events += launched(10 * step + 3, "nvjet_tst", start + 600, 100, "aten::bmm")
    events += launched(31, "sm80_xmma_fprop_implicit_gemm", 3200, 500, "aten::cudnn_convolution")
    events += launched(41, "nvjet_tst", 500, 300, "aten::addmm")  # before the first step
    events.append({"ph": "i", "name": "an instant"})
    flops = {"denoising_step": {"linear": 6e9, "attention": 1e9}, "vae_decode": {"convolution": 5e9}}
    parts = profile.split({"traceEvents": events}, "cuda")
    found = profile.summarize(parts, "cuda", flops)
    step = found["denoising_step"]
    assert (step["ms"], step["ranges"]) == (1.0, 2)
    assert step["classes"]["linear"] == pytest.approx({"ms": 0.3, "kernels": 1, "tflops": 20})
    assert step["classes"]["attention"] == pytest.approx({"ms": 0.1, "kernels": 1, "tflops": 10})
    assert step["classes"]["pointwise"] == pytest.approx({"ms": 0.2, "kernels": 1, "gbs": 20})  # 4 MB in 200 µs
    assert step["classes"]["idle"]["ms"] == pytest.approx(1 - 0.4 - 0.1)
    assert step["top"][0] == {"name": "nvjet_tst", "class": "linear", "ms": pytest.approx(0.3), "times": 1}
    assert found["vae_decode"]["classes"]["convolution"]["tflops"] == pytest.approx(10)
    assert found["text_encoding"] == {"ms": 0, "ranges": 0, "classes": {"idle": {"ms": 0}}, "top": []}
    text = profile.table(found, {"matmul_ceiling_tflops": 40.0, "copy_ceiling_gbs": 200.0})
    assert "| linear | 0.3 | 30% | 1 | 20 (50%) |  |" in text
    assert "| pointwise | 0.2 | 20% | 1 |  | 20 (10%) |" in text
    assert "text_encoding" not in text
    assert "3 kernels; 166.7 µs between two on average." in text
    assert profile.kernels_csv(parts).splitlines() == [
        "part,class,kernel,times,ms,us",
        "denoising_step,linear,nvjet_tst,1.0,0.3,300.0",
        "denoising_step,pointwise,triton_poi_fused_mul_0,1.0,0.2,200.0",
        "denoising_step,attention,nvjet_tst,1.0,0.1,100.0",
        "vae_decode,convolution,sm80_xmma_fprop_implicit_gemm,1.0,0.5,500.0",
    ]


def test_what_a_graphs_kernels_are_given_is_told_by_a_call_without_it() -> None:
    """Of one name there are 1 MB and 3 MB, in another order; of the other nothing is known."""
    replayed = [profile.Kernel(name, "pointwise", 0, 100) for name in ("a", "a", "b")]
    told = [profile.Kernel("a", "pointwise", 0, 500, size) for size in (3_000_000, 1_000_000)]
    told.append(profile.Kernel("b", "pointwise", 0, 500))
    parts = {"denoising_step": profile.Part([(0, 1000)], replayed), "vae_decode": profile.Part([(0, 10)], replayed)}
    others = {"denoising_step": profile.Part([(0, 2000)], told), "vae_decode": profile.Part([(0, 10)], [])}
    found = profile.with_sizes(parts, others)
    assert [each.read_and_written for each in found["denoising_step"].kernels] == [2_000_000, 2_000_000, None]
    assert found["vae_decode"] == parts["vae_decode"]
    step = profile.summarize(found, "cuda", {})["denoising_step"]
    assert step["classes"]["pointwise"]["gbs"] == pytest.approx(20)  # 2 MB in 100 µs, of what is known


def test_the_table_of_all_kernels_has_them_by_their_whole_names() -> None:
    names = [f"void at::native::elementwise_kernel<128, 4, Functor_{number:0100}>" for number in range(12)]
    kernels = [profile.Kernel(name, "pointwise", 0, 10 * index) for index, name in enumerate(names, 1)]
    part = profile.Part([(0, 500), (500, 1000), (1000, 1500)], [*kernels, kernels[-1]])
    rows = list(csv.DictReader(profile.kernels_csv({"denoising_step": part}).splitlines()))
    assert [row["kernel"] for row in rows] == names[::-1]
    assert (rows[0]["times"], rows[0]["ms"], rows[0]["us"]) == ("0.667", "0.08", "120.0")  # twice in three steps
    assert len(profile.summarize({"denoising_step": part}, "cuda", {})["denoising_step"]["top"]) == profile.TOP


def test_on_a_cpu_an_operator_has_its_own_time_without_what_it_calls() -> None:
    def operator(name: str, start: float, busy: float, thread: int = 1) -> Event:
        return {"ph": "X", "cat": "cpu_op", "name": name, "ts": start, "dur": busy, "tid": thread}

    events = [marked("vae_decode", 0, 1000) | {"tid": 1}]
    events += [operator("aten::linear", 100, 400), operator("aten::t", 110, 40), operator("aten::addmm", 150, 340)]
    events += [operator("aten::mul", 600, 100), operator("aten::mul", 600, 100, thread=2)]
    found = profile.summarize(profile.split({"traceEvents": events}, "cpu"), "cpu", {})["vae_decode"]["classes"]
    assert {kind: each["ms"] for kind, each in found.items()} == pytest.approx(
        {"linear": 0.34, "other": 0.06, "pointwise": 0.1, "idle": 0.5}
    )


def test_a_call_with_graphs_is_followed_by_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        build = pipeline.build_pipeline(planned().rungs[2], lambda _: None)[0]
        without: list[bool] = []
        monkeypatch.setattr(pipeline, "call", lambda _: without.append(graphs.are_unwanted()))
        for names in (build.spec.optimizations, (*build.spec.optimizations, "cuda_graph")):
            profile.profile(replace(build, spec=replace(build.spec, optimizations=names)), tmp_path, {}, {})
    assert without == [False, False, False, False, True, True]  # each after one that isn't looked at


def test_a_real_call_is_profiled(tmp_path: Path) -> None:
    with torch.no_grad():
        build = pipeline.build_pipeline(planned().rungs[2], lambda _: None)[0]
        flops = roofline.count_flops(build)
        found = profile.profile(build, tmp_path, flops, {"matmul_ceiling_tflops": 1.0})
    assert [(part, facts["ranges"]) for part, facts in found.items()] == [
        ("denoising_step", profile.STEPS - 1),
        ("vae_decode", 1),
        ("text_encoding", 1),
    ]
    step = found["denoising_step"]
    assert sum(each["ms"] for each in step["classes"].values()) == pytest.approx(step["ms"], rel=0.01)
    assert {"attention", "convolution", "linear", "norm", "pointwise"} <= set(step["classes"])
    assert step["classes"]["linear"]["tflops"] > 0
    with gzip.open(tmp_path / spool.TRACE) as file:
        assert json.load(file)["traceEvents"]
    assert not (tmp_path / "trace.json").exists()
    assert "## denoising_step" in (tmp_path / spool.PROFILE).read_text()
    with (tmp_path / spool.KERNELS).open() as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == set(profile.PARTS)
    spent = sum(float(row["ms"]) for row in rows if row["part"] == "denoising_step")
    assert spent + step["classes"]["idle"]["ms"] == pytest.approx(step["ms"], rel=0.01)
    assert "step" not in vars(build.pipe.scheduler)
