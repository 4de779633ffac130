"""Stages attention, layout, fuse, swap and hoist: the same computation by other layers."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from diffusion_fast import graphs
from diffusion_fast.optimizations.registry import Build, optimization


@optimization(
    stage="attention",
    code="""
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
for name, network in pipe.components.items():
    kinds = {type(processor) for processor in getattr(network, "attn_processors", {}).values()}
    if kinds and kinds <= {AttnProcessor, AttnProcessor2_0}:  # others have fused attention alone
        network.set_attn_processor(AttnProcessor2_0())
    elif name.startswith("text_encoder") and network._supports_sdpa:
        network.set_attn_implementation("sdpa")
""",
)
def sdpa(build: Build) -> dict[str, Any]:
    """Compute attention by scaled_dot_product_attention: fused kernels that never write the score matrix out.

    What they can't do is left as it is: a text encoder that caps its scores, and linear attention, which has none.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    from diffusion_fast import scores

    changed, left = 0, []
    for name, network in build.networks():
        settable = hasattr(network, "set_attn_processor") or network is build.denoiser
        processors = getattr(network, "attn_processors", {}).values()
        written_out = any(isinstance(each, scores.WithScores) for each in processors)
        if settable and (written_out or not hasattr(network, "set_default_attn_processor")):
            fused = scores.fuse(network)
            if not fused:
                raise RuntimeError(f"sdpa: no attention of {name} has scores")
            changed += fused
        elif hasattr(network, "set_attn_processor"):
            network.set_attn_processor(AttnProcessor2_0())
            kinds = {type(processor) for processor in network.attn_processors.values()}
            if kinds != {AttnProcessor2_0}:
                raise RuntimeError(f"sdpa: {name} still attends by {sorted(kind.__name__ for kind in kinds)}")
            changed += len(network.attn_processors)
        elif name.startswith("text_encoder") and not network._supports_sdpa:
            left.append(name)
        elif name.startswith("text_encoder"):
            network.set_attn_implementation("sdpa")
            if network.config._attn_implementation != "sdpa":
                raise RuntimeError(f"sdpa: {name} still attends by {network.config._attn_implementation}")
            changed += network.config.num_hidden_layers
    return {"attention_layers": changed} | ({"left": left} if left else {})


KERNELS = ("cudnn", "flash", "mem_efficient")  # of PyTorch's; the last takes what the others don't, and stays allowed


# Behind fused_qkv, which changes how queries, keys and values lie in memory.
@optimization(stage="swap", requires=("bf16", "sdpa"), devices=("cuda",), calls_pipeline=True)
def attention_backend(build: Build) -> dict[str, Any]:
    """Time PyTorch's attention kernels on what the denoiser attends to, and allow the fastest in the others' place.

    https://docs.pytorch.org/docs/stable/backends.html#torch.backends.cuda.enable_flash_sdp
    """
    import torch

    start = time.perf_counter()
    calls = Counter({layouts: count for (layouts, _), count in _attention_calls(build).items()})
    by_layer = {name: _attention_seconds(name, calls) for name in KERNELS}
    graphs.forget(())
    others = by_layer[KERNELS[-1]]  # takes what one of the others can't do
    seconds = {
        name: sum(count * (others if found[each] == math.inf else found)[each] for each, count in calls.items())
        for name, found in by_layer.items()
    }
    best = min(reversed(KERNELS), key=seconds.__getitem__)
    if seconds[best] == math.inf:
        raise RuntimeError("attention_backend: none of PyTorch's fused kernels can do all of this denoiser's attention")
    for name in KERNELS:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(name in (best, KERNELS[-1]))
    # What is allowed decides what a graph is traced to, but isn't part of what it is found by in a compile cache: one
    # that was compiled under another choice would be taken, and this one have no effect.
    torch.compiler.config.cache_key_tag += f" attention by {best}"
    milliseconds = {name: 1000 * each for name, each in seconds.items() if each != math.inf}
    return {"backend": best, "step_ms": milliseconds, "calibration_s": time.perf_counter() - start}


def _attention_calls(build: Build, layers: Iterable[Any] = ()) -> Counter[tuple[Any, ...]]:
    """Shapes and strides of query, key, value and mask (or None) in a step of the denoiser, and how often they come.

    Behind these stands which of `layers` attended, or None.
    """
    import torch

    functional, calls, current = torch.nn.functional, Counter[tuple[Any, ...]](), None
    attend = functional.scaled_dot_product_attention

    def noting(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        given = (query, key, value, attn_mask)
        layouts = tuple(None if each is None else (tuple(each.shape), each.stride()) for each in given)
        calls[layouts, current] += 1
        return attend(query, key, value, attn_mask, *args, **kwargs)

    def begin(*_: Any) -> None:
        calls.clear()
        functional.scaled_dot_product_attention = noting

    def note(layer: Any, *_: Any) -> None:
        nonlocal current
        current = layer

    # Only while the denoiser runs: the other networks have attention of their own, once a call.
    hooks = [build.denoiser.register_forward_pre_hook(begin)]
    for layer in layers:
        hooks += [layer.register_forward_pre_hook(note), layer.register_forward_hook(lambda *_: note(None))]
    hooks += [build.denoiser.register_forward_hook(lambda *_: setattr(functional, attend.__name__, attend))]
    try:
        build.short_call(*hooks)
    finally:
        functional.scaled_dot_product_attention = attend
    return calls


CALLS = 20  # in one graph: a launch of them takes the host a fraction of what they take the GPU


def _attention_seconds(kernel: str, layers: Iterable[tuple[Any, ...]]) -> dict[tuple[Any, ...], float]:
    """Seconds of the GPU for each layer's attention, on random numbers; infinite where there is no such kernel for it.

    By one of KERNELS, by whichever of them PyTorch takes as it is ("allowed"), or by our own ("own").
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from diffusion_fast import timings

    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    allowed = [name for name in KERNELS if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    who = f"any of {allowed}" if kernel == "allowed" else kernel
    if kernel == "own":
        from diffusion_fast import attention, attention_kernels

        attend, who = attention.own, f"own {timings.version(attention_kernels)}"

    def measure(layouts: tuple[Any, ...]) -> float:
        try:
            with sdpa_kernel(backends[kernel]) if kernel in backends else nullcontext():
                return _seconds(attend, layouts)
        except torch.OutOfMemoryError:
            raise  # which says nothing of the kernel
        except RuntimeError:
            return math.inf

    return {
        layouts: timings.kept(f"attention by {who}, {layouts}", functools.partial(measure, layouts))
        for layouts in layers
    }


def _seconds(attend: Any, layouts: tuple[Any, ...]) -> float:
    """Of the GPU: the host would need longer to launch small ones than they take, and all would look alike."""
    import torch
    from torch.utils.benchmark import Timer

    given = [each and torch.empty_strided(*each, device="cuda", dtype=torch.bfloat16).normal_() for each in layouts]
    replay, _ = graphs.record_on_gpu(lambda: [attend(*given) for _ in range(CALLS)])
    timer = Timer("replay()", globals={"replay": replay})
    return float(timer.blocked_autorange(min_run_time=0.05).median) / CALLS


# Behind attention_backend, whose choice it is compared with, and before eight_bits and prompt_projections take the
# layers' linears.
@optimization(
    stage="swap",
    requires=("bf16", "sdpa"),
    min_capability=(9, 0),
    imports=("diffusion_fast.attention",),
    model_needs="plain_attention",
    calls_pipeline=True,
)
def attention_kernel(build: Build) -> dict[str, Any]:
    """Compute the denoiser's attention by a kernel of our own, in layers where this GPU is faster by it than PyTorch's.

    It reads a fused projection as it lies. Layers with a mask, or with heads that it doesn't take, stay with PyTorch's.
    FlashAttention-2, https://arxiv.org/abs/2307.08691
    """
    from diffusion_fast.attention import KernelAttnProcessor, attention_layers, take_over

    start = time.perf_counter()
    layers = attention_layers(build.denoiser)
    fitting = [layer for layer in layers if KernelAttnProcessor.can_take(layer)]
    layouts: dict[Any, Counter[tuple[Any, ...]]] = {}
    for (each, layer), count in _attention_calls(build, fitting).items() if fitting else ():
        layouts.setdefault(layer, Counter())[each] += count
    unmasked = [layer for layer in fitting if layouts.get(layer) and not any(each[3] for each in layouts[layer])]
    if not unmasked:
        raise RuntimeError(
            f"attention_kernel: of {len(layers)} attention layers of {type(build.denoiser).__name__} "
            f"{len(fitting)} have heads and projections that the kernel takes, and none of them attends without a mask"
        )
    taken, milliseconds = unmasked, {}
    if build.spec.device == "cuda":  # elsewhere there is no kernel that could be faster: what it means is computed
        different = set().union(*(layouts[layer] for layer in unmasked))
        seconds = {by: _attention_seconds(by, different) for by in ("allowed", "own")}
        graphs.forget(())

        def total(by: str, layers: list[Any]) -> float:
            return sum(count * seconds[by][each] for layer in layers for each, count in layouts[layer].items())

        taken = [layer for layer in unmasked if total("own", [layer]) < total("allowed", [layer])]
        milliseconds = {by: 1000 * total(by, taken) for by in seconds}
    take_over(taken)  # none, where PyTorch's are faster in all: such is the choice for this GPU

    def proof() -> dict[str, Any]:
        kept = sum(isinstance(layer.processor, KernelAttnProcessor) for layer in attention_layers(build.denoiser))
        if kept != len(taken):
            raise RuntimeError(f"attention_kernel: {kept} of {len(taken)} layers still attend by it")
        return {"attention_layers": kept}

    build.proofs["attention_kernel"] = proof
    return {
        "attention_layers": len(taken),
        "slower": len(unmasked) - len(taken),
        "masked": len(fitting) - len(unmasked),
        "others": len(layers) - len(fitting),
        **({"step_ms": milliseconds} if milliseconds else {}),
        "calibration_s": time.perf_counter() - start,
    }


# In plain fp32 the scores' product would take longer than all that is saved.
@optimization(
    stage="swap",
    requires=("tf32", "bf16", "sdpa"),
    devices=("cuda",),
    imports=("diffusion_fast.sliced",),
    model_needs="wide_vae_heads",
)
def sliced_vae_attention(build: Build) -> dict[str, Any]:
    """Compute the attention of the VAE's decoder, one head wider than fast kernels take, as matmuls, slice by slice.

    Slices of queries: what is between two products stays in the cache. https://arxiv.org/abs/2112.05682
    """
    from diffusion_fast import sliced

    layers = sliced.slice_wide_heads(build.pipe.vae.decoder)
    if not layers and "tiny_vae" not in build.spec.optimizations:  # which has none
        raise RuntimeError(f"sliced_vae_attention: no attention of the VAE has one head wider than {sliced.WIDEST}")
    return {"attention_layers": layers}


@optimization(
    stage="layout",
    code="""
for network in (denoiser, pipe.vae):
    network.to(memory_format=torch.channels_last)
""",
)
def channels_last(build: Build) -> dict[str, Any]:
    """Store images channel by channel at each pixel (NHWC), the layout that cuDNN's tensor-core convolutions read.

    https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
    """
    import torch

    changed = already = 0
    for network in (build.denoiser, build.pipe.vae):
        before = {p.data_ptr() for p in network.parameters() if p.ndim == 4 and _is_channels_last(p)}
        network.to(memory_format=torch.channels_last)
        for parameter in network.parameters():
            if parameter.ndim == 4:
                if not _is_channels_last(parameter):
                    raise RuntimeError(f"channels_last: a {tuple(parameter.shape)} weight kept its layout")
                already += parameter.data_ptr() in before
                changed += parameter.data_ptr() not in before
    return {"convolutions_changed": changed, "already": already}


def _is_channels_last(tensor: Any) -> bool:
    import torch

    return bool(tensor.is_contiguous(memory_format=torch.channels_last))


FUSED = {  # diffusers' names of fused projections, and of those that they stand for
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@optimization(
    stage="fuse",
    requires=("sdpa",),
    model_needs="fusable_projections",
    takes_adapters=False,
    code=f"""
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
fused = {FUSED}
for network in (denoiser, pipe.vae):
    layers = [module for module in network.modules() if isinstance(module, Attention | AttentionModuleMixin)]
    if layers:
        network.fuse_qkv_projections()
    for module in layers:  # diffusers keeps the separate layers beside the fused one
        for name in [name for by, names in fused.items() if hasattr(module, by) for name in names]:
            delattr(module, name)
""",
)
def fused_qkv(build: Build) -> dict[str, Any]:
    """Compute query, key and value by one matmul (key and value in cross-attention); the separate weights are freed.

    https://huggingface.co/docs/diffusers/tutorials/fast_diffusion#combining-the-attention-blocks-projection-matrices
    """
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    fused = freed = 0
    for network in (build.denoiser, build.pipe.vae):
        layers = [module for module in network.modules() if isinstance(module, Attention | AttentionModuleMixin)]
        if layers:
            network.fuse_qkv_projections()
        for module in layers:
            # Attention of a model's own (AttentionModuleMixin) has one processor, for both.
            fitting = isinstance(module, AttentionModuleMixin) or isinstance(module.processor, FusedAttnProcessor2_0)
            if not (module.fused_projections and fitting):
                raise RuntimeError("fused_qkv: an attention layer was left unfused")
            # diffusers keeps the separate layers beside the fused one, and quantizing would then quantize both.
            for name in [name for by, names in FUSED.items() if hasattr(module, by) for name in names]:
                freed += sum(parameter.numel() for parameter in getattr(module, name).parameters())
                delattr(module, name)
            fused += 1
    return {"attention_layers": fused, "freed_parameters": freed}


@optimization(
    stage="swap",
    imports=("torchao.quantization",),
    model_needs="small_1x1_convolutions",
    code="""
from torchao.quantization.quant_api import swap_conv2d_1x1_to_linear


def small_1x1(module, *_):
    is_1x1 = isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1)
    return is_1x1 and 128 in (module.in_channels, module.out_channels)


for network in (denoiser, pipe.vae):
    swap_conv2d_1x1_to_linear(network, small_1x1)
""",
)
def conv_as_linear(build: Build) -> dict[str, Any]:
    """Turn 1x1 convolutions with 128 input or output channels into linear layers, as diffusion-fast does.

    In SDXL that is no convolution of the UNet and two of the VAE.
    https://github.com/huggingface/diffusion-fast
    """
    import torch
    from torchao.quantization.quant_api import swap_conv2d_1x1_to_linear

    def small_1x1(module: torch.nn.Module, *_: Any) -> bool:
        return (
            isinstance(module, torch.nn.Conv2d)
            and module.kernel_size == (1, 1)
            and 128 in (module.in_channels, module.out_channels)
        )

    swapped = 0
    for network in (build.denoiser, build.pipe.vae):
        swapped += sum(map(small_1x1, network.modules()))
        swap_conv2d_1x1_to_linear(network, small_1x1)
        if any(map(small_1x1, network.modules())):
            raise RuntimeError("conv_as_linear: a 1x1 convolution was left")
    return {"convolutions": swapped}


@optimization(
    stage="swap",
    requires=(("bf16", "fp16"),),
    excludes=("int8_dynamic",),
    min_capability=(9, 0),
    imports=("diffusion_fast.gated",),
    model_needs="unet",
    takes_adapters=False,
)
def fused_geglu(build: Build) -> dict[str, Any]:
    """Compute a feed-forward's first linear and its GEGLU by one kernel: half is written, and nothing read again.

    A kernel of our own, with weights reordered for it; the originals are freed. Layers that fp8_rows or int8_rows then
    take have it in eight bits. GLU variants: https://arxiv.org/abs/2002.05202
    """
    from diffusion_fast import gated

    try:
        fused = gated.fuse(build.denoiser)
    except ValueError as error:
        raise RuntimeError(f"fused_geglu: {error}") from error
    if not fused:
        raise RuntimeError(f"fused_geglu: {type(build.denoiser).__name__} has no feed-forward with GEGLU")
    return {"feed_forwards": fused}


# In a whole network that is compiled nothing lies between two blocks: there Inductor does it unasked.
@optimization(
    stage="fuse",
    requires=("regional_compile",),
    imports=("diffusion_fast.chained",),
    model_needs="chained_blocks",
)
def fused_add_norm(build: Build) -> dict[str, Any]:
    """Leave the sum at a transformer block's end to the next block, where it is one kernel with the first norm.

    As engines for language models do, https://docs.vllm.ai/en/latest/api/vllm/ir/ops/ (fused_add_rms_norm).
    """
    from diffusion_fast import chained

    left = chained.chain(build.denoiser)
    if not left:
        raise RuntimeError(f"fused_add_norm: {type(build.denoiser).__name__} has no plain transformer blocks in a row")
    return {"sums": left}


@optimization(stage="layout", requires=("channels_last",), model_needs="unet")
def no_layout_copies(build: Build) -> dict[str, Any]:
    """Keep NHWC behind each transformer, where diffusers makes a copy in NCHW that the next convolution undoes.

    The numbers are the same. https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
    """
    from diffusers import Transformer2DModel

    changed = 0
    for module in build.denoiser.modules():
        if isinstance(module, Transformer2DModel) and module.is_input_continuous:
            module._get_output_for_continuous_inputs = functools.partial(_output_in_nhwc, module)
            changed += 1
    if not changed:
        raise RuntimeError(f"no_layout_copies: {type(build.denoiser).__name__} has no transformer between convolutions")
    return {"transformers": changed}


def _output_in_nhwc(
    transformer: Any, hidden_states: Any, residual: Any, batch_size: int, height: int, width: int, inner_dim: int
) -> Any:
    """Tokens of shape (batch, height × width, channels) as an image, plus `residual`: both NHWC in memory."""

    def image(tokens: Any) -> Any:
        return tokens.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)

    if transformer.use_linear_projection:
        return image(transformer.proj_out(hidden_states)) + residual
    return transformer.proj_out(image(hidden_states)) + residual


@optimization(stage="swap", requires=("channels_last",), imports=("diffusion_fast.norms",), model_needs="group_norms")
def group_norm_kernels(build: Build) -> dict[str, Any]:
    """Normalize images by kernels of our own: group norm, the SiLU behind it and the biases before it in two passes.

    In the denoiser and the VAE's decoder; statistics are fp32. Wu and He 2018, https://arxiv.org/abs/1803.08494
    """
    from diffusion_fast import norms

    account = Counter[str]()
    for network in (build.denoiser, build.pipe.vae.decoder):
        account.update(norms.replace_group_norms(network))
    if not account["group_norms"] and "tiny_vae" not in build.spec.optimizations:  # which has none
        raise RuntimeError("group_norm_kernels: neither the denoiser nor the VAE's decoder has a group norm of images")
    return dict(account)


@optimization(stage="swap")
def device_postprocessing(build: Build) -> dict[str, Any]:
    """Round pictures to bytes on the device and copy those to the host, a quarter of what floats are.

    Ours; the bytes are those of https://huggingface.co/docs/diffusers/api/image_processor
    """
    processor = build.pipe.image_processor
    processor.postprocess = functools.partial(_to_pil_from_bytes, processor, processor.postprocess)
    return {"processor": type(processor).__name__}


def _to_pil_from_bytes(
    processor: Any, original: Any, image: Any, output_type: str = "pil", do_denormalize: list[bool] | None = None
) -> Any:
    """`image`: floats of shape (batch, 3, height, width) in -1..1, as the VAE decodes them. PIL images, bit for bit
    those that diffusers makes on the host; other output types are left to `original`.
    """
    import torch
    from PIL import Image

    if output_type != "pil":
        return original(image, output_type, do_denormalize)
    levels = (processor._denormalize_conditionally(image, do_denormalize).float() * 255).round().to(torch.uint8)
    return [Image.fromarray(each) for each in levels.permute(0, 2, 3, 1).cpu().numpy()]


# Compiling the whole denoiser would take in the question whether its prompt is a new one: regional_compile doesn't.
@optimization(
    stage="hoist",
    excludes=("compile", "ahead_of_time"),
    imports=("diffusion_fast.projections",),
    takes_adapters=False,
    calls_pipeline=True,
)
def prompt_projections(build: Build) -> dict[str, Any]:
    """Project the prompt to keys and values when it is a new one, not in every step: they are the same in all.

    As https://github.com/sgl-project/sglang/pull/29755 does for a video model. The layers stay, for the next prompt.
    """
    import torch

    from diffusion_fast.projections import PromptProjections

    start = time.perf_counter()
    parameters = list(inspect.signature(type(build.denoiser).forward).parameters)
    linears = (module for module in build.denoiser.modules() if isinstance(module, torch.nn.Linear))
    layers = _given(build, build.denoiser, PROMPT, linears)
    calibration_s = time.perf_counter() - start
    if not layers:
        raise RuntimeError(
            f"prompt_projections: no linear layer of {type(build.denoiser).__name__} is given the prompt as it is"
        )
    hoisted = PromptProjections(build.denoiser, layers, position=parameters.index(PROMPT) - 1)
    build.prompt_calls.append(("prompt", hoisted, "project"))

    def proof() -> dict[str, Any]:
        projected, steps = hoisted.projected, hoisted.steps
        every = projected == steps and build.spec.steps > 2  # guidance that ends makes two prompts of a call's one
        if every or not projected:
            raise RuntimeError(f"prompt_projections: the prompt was projected {projected} times in {steps} steps")
        return {"projected": projected, "steps": steps}

    build.proofs["prompt_projections"] = proof
    return {"projections": len(layers), "calibration_s": calibration_s}


PROMPT = "encoder_hidden_states"  # diffusers' name of it in every denoiser


def _given(build: Build, owner: Any, name: str, modules: Iterable[Any]) -> list[Any]:
    """Those of `modules` that are called with the tensor itself that `owner` is called with as `name`, each time."""
    tensor: Any = None
    given: dict[Any, bool] = {}

    def begin(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal tensor
        tensor = kwargs.get(name)  # by name, as pipelines call a denoiser, and diffusers' UNets their blocks

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = tensor is not None and any(each is tensor for each in (*args, *kwargs.values()))
        given[module] = given.get(module, True) and found

    hooks = [owner.register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    build.short_call(*hooks)
    return [module for module, each_time in given.items() if each_time]


# Compiling the whole denoiser would take in where the projections are kept; besides, Inductor sees them all there.
@optimization(
    stage="hoist",
    # Numbers that are stored otherwise than they are multiplied can't be joined.
    excludes=(
        *("compile", "ahead_of_time", "layerwise_casting"),
        *("int8_weight_only", "fp8_weight_only", "int4_weight_only"),
    ),
    imports=("diffusion_fast.projections",),
    model_needs="unet",
    takes_adapters=False,
    calls_pipeline=True,
)
def time_projections(build: Build) -> dict[str, Any]:
    """Project the time step for all residual blocks by one product a step, instead of a small one in each block.

    Horizontal fusion, https://arxiv.org/abs/2007.01277
    """
    from diffusion_fast.projections import TimeProjections

    start = time.perf_counter()
    projecting = filter(_projects_the_time, build.denoiser.modules())
    blocks = _given(build, build.denoiser.down_blocks[0], "temb", projecting)
    calibration_s = time.perf_counter() - start
    if len(blocks) < 2:
        raise RuntimeError(
            f"time_projections: {len(blocks)} residual blocks of {type(build.denoiser).__name__} are given the time "
            "embedding as it is"
        )
    layers = [block.time_emb_proj for block in blocks]
    together = TimeProjections(build.denoiser, layers, blocks[0].nonlinearity)

    def proof() -> dict[str, Any]:
        if not together.steps:
            raise RuntimeError("time_projections: no step was projected for all blocks")
        return {}  # a recorded step is counted once, so the count says nothing

    build.proofs["time_projections"] = proof
    return {"projections": len(layers), "calibration_s": calibration_s}


def _projects_the_time(module: Any) -> bool:
    """Whether it is a residual block whose time projection is a plain linear layer behind a SiLU."""
    import torch
    from diffusers.models.resnet import ResnetBlock2D

    return (
        isinstance(module, ResnetBlock2D)
        and type(module.time_emb_proj) is torch.nn.Linear
        and type(module.time_emb_proj.weight.data) is torch.Tensor  # not torchao's
        and type(module.nonlinearity) is torch.nn.SiLU
        and not module.skip_time_act
    )
