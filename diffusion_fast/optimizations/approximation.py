"""Stage approximate: less work for nearly the same picture. The scheduler's steps stay; none of this is lossless."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any

from diffusion_fast.optimizations.registry import Build, optimization

REUSE_EVERY = 3  # steps: one in so many is computed in full
FORECAST_EVERY = 2
GUIDED = 0.5  # of the steps: they decide what is painted where


# Compiling the whole denoiser would take the choice between the two kinds of steps for a part of it: regional_compile
# doesn't.
@optimization(
    stage="approximate",
    excludes=("compile", "ahead_of_time"),
    model_needs="unet",
    lossless=False,
    same_work=False,
    reuses_features=True,
)
def feature_reuse(build: Build) -> dict[str, Any]:
    """Compute the UNet's deep features in every third step, and its outermost blocks alone in those between.

    DeepCache, https://arxiv.org/abs/2312.00858, at its shallowest branch.
    """
    return _reuse(build, "feature_reuse", every=REUSE_EVERY, points=1)


@optimization(
    stage="approximate",
    excludes=("compile", "ahead_of_time", "feature_reuse"),
    model_needs="unet",
    lossless=False,
    same_work=False,
    reuses_features=True,
)
def feature_forecast(build: Build) -> dict[str, Any]:
    """Compute the UNet's deep features in every second step, and forecast those between from the last three.

    By the parabola through them: TaylorSeer's second order, https://arxiv.org/abs/2503.06923, for the features that
    DeepCache keeps.
    """
    return _reuse(build, "feature_forecast", every=FORECAST_EVERY, points=3)


def _reuse(build: Build, name: str, every: int, points: int) -> dict[str, Any]:
    reused = ReusedFeatures(build.denoiser, every, points)
    build.step_calls = [("full", reused, "full"), ("shallow", reused, "shallow")]
    build.denoiser.forward = reused
    _at_the_start_of_each_call(build.pipe, reused.restart)

    def proof() -> dict[str, Any]:
        if not (reused.full_steps and reused.shallow_steps):
            raise RuntimeError(f"{name}: {reused.full_steps} full and {reused.shallow_steps} shallow steps")
        return {"full_steps": reused.full_steps, "shallow_steps": reused.shallow_steps}

    if build.spec.steps > 1:
        build.proofs[name] = proof
    return {"every": every}


def _at_the_start_of_each_call(pipe: Any, begin: Callable[[], None]) -> None:
    """Call `begin` before the pipeline prepares its latents: it does so once a call, whatever its scheduler is then."""
    prepare = pipe.prepare_latents

    @functools.wraps(prepare)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        begin()
        return prepare(*args, **kwargs)

    pipe.prepare_latents = prepared


def _at_the_end_of_each_step(scheduler: Any, end: Callable[[], None]) -> None:
    """Call `end` when the scheduler steps: a pipeline has it do so once a step, however often it calls its denoiser."""
    step = type(scheduler).step

    @functools.wraps(step)  # pipelines read which arguments it takes
    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        end()
        return step(self, *args, **kwargs)

    scheduler.step = types.MethodType(stepped, scheduler)  # a copy of the scheduler has one of its own


class ReusedFeatures:
    """A UNet2DConditionModel's forward, which keeps what enters its last block in one step for those that follow.

    Of `every` so many steps one is computed in full. The features of the others lie on the polynomial through the last
    `points` of these: with one point they are its own. Raises TypeError where it is given what changes the blocks
    between, such as a ControlNet's residuals.
    """

    def __init__(self, unet: Any, every: int, points: int) -> None:
        if not (hasattr(unet, "down_blocks") and hasattr(unet, "up_blocks")):
            raise RuntimeError(f"feature_reuse: {type(unet).__name__} has no blocks that lead down and up again")
        self.unet, self.original = unet, unet.forward
        self.every, self.points = every, points
        self.entering: Any = None
        unet.up_blocks[-1].register_forward_pre_hook(self._note, with_kwargs=True)
        self.kept: list[tuple[int, Any]] = []  # full steps and their features, the last of them last
        self.step = 0
        self.full_steps = self.shallow_steps = 0

    def restart(self) -> None:
        """Reuse nothing of the trajectory before."""
        self.step, self.kept = 0, []

    def __call__(
        self,
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        *,
        added_cond_kwargs: dict[str, Any] | None = None,
        timestep_cond: Any = None,
        cross_attention_kwargs: Any = None,
        return_dict: bool = False,
    ) -> tuple[Any]:
        """As the UNet's forward, without what goes into its middle; a tuple in any case."""
        given = sample, timestep, encoder_hidden_states, added_cond_kwargs, timestep_cond
        if self.kept and self.kept[0][1].shape[0] != sample.shape[0]:
            self.kept = []  # guidance has ended: there are half as many rows
        if self.step % self.every == 0 or not self.kept:
            output, features = self.full(*given, cross_attention_kwargs)
            self.kept = [*self.kept, (self.step, features)][-self.points :]
            self.full_steps += 1
        else:
            output = self.shallow(*given, self._expected())
            self.shallow_steps += 1
        self.step += 1
        return (output,)

    def _expected(self) -> Any:
        """The features of this step, by those that were kept."""
        if len(self.kept) == 1:
            return self.kept[0][1]
        steps = [step for step, _ in self.kept]
        weights = [
            math.prod((self.step - other) / (step - other) for other in steps if other != step) for step in steps
        ]  # Lagrange's
        expected = self.kept[0][1] * weights[0]
        for weight, (_, features) in zip(weights[1:], self.kept[1:], strict=True):
            expected.add_(features, alpha=weight)
        return expected

    def full(
        self, sample: Any, timestep: Any, text: Any, added: Any, timestep_cond: Any, cross_attention_kwargs: Any
    ) -> tuple[Any, Any]:
        """What the whole UNet gives, and what entered its last block on the way."""
        (output,) = self.original(
            sample,
            timestep,
            text,
            added_cond_kwargs=added,
            timestep_cond=timestep_cond,
            cross_attention_kwargs=cross_attention_kwargs,
            return_dict=False,
        )
        return output, self.entering

    def shallow(self, sample: Any, timestep: Any, text: Any, added: Any, timestep_cond: Any, features: Any) -> Any:
        """What the UNet gives when `features` enter its last block: its own first block, and its last."""
        unet = self.unet
        first, last = unet.down_blocks[0], unet.up_blocks[-1]
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), timestep_cond)
        aug = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
        emb = emb if aug is None else emb + aug
        text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
        sample = unet.conv_in(sample)
        _, skips = first(hidden_states=sample, temb=emb, **_attending(first, text))
        # The first block's last skip, behind its downsampling, is for the block before the last.
        skips = (sample, *skips)[: len(last.resnets)]
        sample = last(hidden_states=features, temb=emb, res_hidden_states_tuple=skips, **_attending(last, text))
        if unet.conv_norm_out:
            sample = unet.conv_act(unet.conv_norm_out(sample))
        return unet.conv_out(sample)

    def _note(self, _: Any, args: Any, kwargs: Any) -> None:
        self.entering = kwargs["hidden_states"]


def _attending(block: Any, text: Any) -> dict[str, Any]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


# The choice whether to compute is for the host, inside of what would be one graph.
UNCOMPILED = ("compile", "regional_compile", "ahead_of_time", "cuda_graph")
FIRST_BLOCK_CHANGE = 0.05  # diffusers' own: of what the first block adds, relative to the last step that was computed


@optimization(
    stage="approximate",
    excludes=(*UNCOMPILED, "pyramid_attention_broadcast"),
    model_needs="cacheable_blocks",
    lossless=False,
    same_work=False,
    code=f"""
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
apply_first_block_cache(denoiser, FirstBlockCacheConfig(threshold={FIRST_BLOCK_CHANGE}))
_set_cache_context(denoiser, CacheContext("both"))  # of rows with guidance and without, where no pipeline says which
""",
)
def first_block_cache(build: Build) -> dict[str, Any]:
    """Skip a transformer's other blocks in steps whose first block adds nearly what it did before: reuse what they add.

    diffusers' own hooks and threshold, for trained weights: with random ones steps differ more, so that none may be
    skipped, and the proof fails. https://github.com/chengzeyi/ParaAttention, after TeaCache, https://arxiv.org/abs/2411.19108
    """
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(build.denoiser, FirstBlockCacheConfig(threshold=FIRST_BLOCK_CHANGE))
    hooked = HookedModules(build.pipe, build.denoiser, "fbc_block_hook")  # the first block has another one
    if build.spec.steps > 1:
        build.proofs["first_block_cache"] = functools.partial(hooked.proof, "first_block_cache")
    return {"threshold": FIRST_BLOCK_CHANGE, "blocks": len(hooked.hooks)}


# How many steps an attention layer's output serves, and between which of the scheduler's 1,000 time steps it does.
BROADCAST = {"spatial": 2, "cross": 6}
BROADCAST_TIMES = (100, 800)


@optimization(
    stage="approximate",
    excludes=(*UNCOMPILED, "first_block_cache"),
    model_needs="transformer",
    lossless=False,
    same_work=False,
    code=f"""
import functools
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastState
now = {{"step": 0, "branch": 0}}  # some pipelines call their denoiser once for each branch of guidance
scheduler_step = pipe.scheduler.step
states = {{}}


@functools.wraps(scheduler_step)
def end_step(*args, **kwargs):
    now.update(step=now["step"] + 1, branch=0)
    return scheduler_step(*args, **kwargs)


def begin_branch(*_):
    for hook in hooks:  # each branch keeps its own attention
        hook.state = states.setdefault((hook, now["branch"]), PyramidAttentionBroadcastState())
    now["branch"] += 1


broadcast = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range={BROADCAST["spatial"]},
    cross_attention_block_skip_range={BROADCAST["cross"]},
    spatial_attention_timestep_skip_range={BROADCAST_TIMES},
    cross_attention_timestep_skip_range={BROADCAST_TIMES},
    current_timestep_callback=lambda: pipe.scheduler.timesteps[now["step"]],
)
apply_pyramid_attention_broadcast(denoiser, broadcast)
layers = [module for module in denoiser.modules() if hasattr(module, "_diffusers_hook")]
hooks = [layer._diffusers_hook.get_hook("pyramid_attention_broadcast") for layer in layers]
denoiser.register_forward_pre_hook(begin_branch)
pipe.scheduler.step = end_step
""",
)
def pyramid_attention_broadcast(build: Build) -> dict[str, Any]:
    """Compute a transformer's self-attention in every second step, its cross-attention in every sixth, and reuse both.

    But in the first and last steps, where attention changes most. By diffusers' own hooks; Zhao et al. 2024,
    https://arxiv.org/abs/2408.12588
    """
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    hooked: BroadcastingLayers | None = None
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=BROADCAST["spatial"],
        cross_attention_block_skip_range=BROADCAST["cross"],
        spatial_attention_timestep_skip_range=BROADCAST_TIMES,
        cross_attention_timestep_skip_range=BROADCAST_TIMES,
        current_timestep_callback=lambda: 0 if hooked is None else hooked.timestep,
    )
    apply_pyramid_attention_broadcast(build.denoiser, config)
    hooked = BroadcastingLayers(build.pipe, build.denoiser, "pyramid_attention_broadcast")
    if not hooked.hooks:
        raise RuntimeError(f"pyramid_attention_broadcast: {type(build.denoiser).__name__} has no attention it knows")
    if build.spec.steps > 1:
        build.proofs["pyramid_attention_broadcast"] = functools.partial(hooked.proof, "pyramid_attention_broadcast")
    return {"attention_layers": len(hooked.hooks), **BROADCAST}


class HookedModules:
    """Modules of a denoiser with one of diffusers' hooks that skip: how often they were called, and how often computed.

    What the hooks keep is forgotten at the start of each call of the pipeline, which not every pipeline does itself.
    """

    def __init__(self, pipe: Any, denoiser: Any, name: str) -> None:
        from diffusers.hooks import HookRegistry

        self.pipe, self.denoiser = pipe, denoiser
        registries = [module._diffusers_hook for module in denoiser.modules() if hasattr(module, "_diffusers_hook")]
        self.hooks = [registry.hooks[name] for registry in registries if name in registry.hooks]
        for hook in self.hooks:
            hook.fn_ref.original_forward = self._counting(hook.fn_ref.original_forward)
        self.calls = self.computed = 0  # of the denoiser, of the modules
        self.registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        self.registry.invalidate_child_registries_cache()  # of a call before, which these hooks were not there for
        _at_the_start_of_each_call(pipe, self.restart)
        denoiser.register_forward_pre_hook(self._begin)

    def restart(self) -> None:
        """Reuse nothing of the trajectory before."""
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        self.registry.reset_stateful_hooks()
        # Under guidance both halves are rows of one batch; a pipeline that calls for each says so itself.
        _set_cache_context(self.denoiser, CacheContext("both"))

    def proof(self, name: str) -> dict[str, Any]:
        """Raises RuntimeError where no module was ever skipped."""
        called = self.calls * len(self.hooks)
        if self.computed >= called:
            raise RuntimeError(f"{name}: all of {len(self.hooks)} modules were computed in each of {self.calls} calls")
        return {"computed": self.computed, "skipped": called - self.computed}

    def _begin(self, *_: Any) -> None:
        self.calls += 1

    def _counting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.computed += 1
            return forward(*args, **kwargs)

        return counted


class BroadcastingLayers(HookedModules):
    """Attention layers under Pyramid Attention Broadcast, with a state of their hooks for each branch of guidance.

    A pipeline may call its denoiser several times a step. diffusers' other hooks keep something for each
    `cache_context` of these calls; this one keeps one output and one count of calls, whoever calls. Here the calls of a
    step are told apart by their order, which is there where a pipeline says nothing of contexts, too.
    """

    def __init__(self, pipe: Any, denoiser: Any, name: str) -> None:
        super().__init__(pipe, denoiser, name)
        self.step = self.branch = 0  # of the call, of the step
        self.timesteps: list[float] = []  # of the scheduler, in the current call
        self.states: list[list[Any]] = []  # of each branch, by hooks
        self.followed: list[Any] = []  # schedulers, each in its turn the pipeline's

    def restart(self) -> None:
        super().restart()
        self.step = self.branch = 0
        self.timesteps, self.states = [], []
        scheduler = self.pipe.scheduler
        if not any(each is scheduler for each in self.followed):
            _at_the_end_of_each_step(scheduler, self._end_step)
            self.followed.append(scheduler)

    @property
    def timestep(self) -> float:
        return self.timesteps[min(self.step, len(self.timesteps) - 1)]

    def _begin(self, *_: Any) -> None:
        super()._begin()
        if not self.timesteps:  # once a call: they are on the device
            self.timesteps = self.pipe.scheduler.timesteps.tolist()
        if self.branch == len(self.states):
            self.states.append([type(hook.state)() for hook in self.hooks])
        for hook, state in zip(self.hooks, self.states[self.branch], strict=True):
            hook.state = state
        self.branch += 1

    def _end_step(self) -> None:
        self.step, self.branch = self.step + 1, 0


def _guided(steps: int) -> int:
    return max(1, round(GUIDED * steps))


@optimization(
    stage="approximate",
    model_needs="guidance_that_ends",
    lossless=False,
    same_work=False,
    needs_guidance=True,
    code=f"""
def end_guidance(pipe, step, timestep, tensors):
    if step != max(1, round({GUIDED} * pipe.num_timesteps)) - 1:
        return {{}}
    pipe._guidance_scale = 0.0
    rows = 2 * tensors.pop("latents").shape[0]
    return {{name: value.chunk(2)[1] for name, value in tensors.items() if value.shape[0] == rows}}


tensors = [name for name in pipe._callback_tensor_inputs if not name.startswith("negative")]
arguments |= {{"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": tensors}}
""",
)
def guidance_cutoff(build: Build) -> dict[str, Any]:
    """Guide the first half of the steps, and give the denoiser the prompt alone in the others: half the rows.

    https://arxiv.org/abs/2404.07724 guides an interval of the steps, https://arxiv.org/abs/2312.12487 the first ones.
    diffusers has a callback for it, which takes a batch's last prompt for all of it.
    """
    guided = _guided(build.spec.steps)
    known = getattr(type(build.pipe), "_callback_tensor_inputs", None)
    if known is None:
        raise RuntimeError(f"guidance_cutoff: {type(build.pipe).__name__} has no callback at the end of a step")
    halves = 0

    def end_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal halves
        if step != _guided(pipe.num_timesteps) - 1:
            return {}
        pipe._guidance_scale = 0.0  # as diffusers' own callback does: the pipeline then no longer doubles the latents
        rows = 2 * tensors.pop("latents").shape[0]
        found = {name: value.chunk(2)[1] for name, value in tensors.items() if value.shape[0] == rows}
        halves += len(found)
        return found

    def proof() -> dict[str, Any]:
        if guided < build.spec.steps and not halves:
            raise RuntimeError("guidance_cutoff: nothing was halved")
        return {"guided_steps": guided}

    build.proofs["guidance_cutoff"] = proof
    build.call_arguments |= {
        "callback_on_step_end": end_guidance,
        "callback_on_step_end_tensor_inputs": [name for name in known if not name.startswith("negative")],
    }
    return {"guided_steps": guided, "steps": build.spec.steps}


@optimization(
    stage="load",
    excludes=("vae_fp16_fix",),
    model_needs="tiny_vae_hub_id",
    lossless=False,
    same_work=False,
    code="""
from diffusers import AutoencoderTiny
parts["vae"] = AutoencoderTiny.from_pretrained("$tiny_vae_hub_id", dtype=torch.$dtype)
""",
)
def tiny_vae(build: Build) -> dict[str, Any]:
    """Decode by a small VAE that was distilled from the model's own: a few convolutions, no attention.

    https://github.com/madebyollin/taesd
    """
    build.tiny_vae = True

    def proof() -> dict[str, Any]:
        if type(build.pipe.vae).__name__ != "AutoencoderTiny":
            raise RuntimeError(f"tiny_vae: the pipeline decodes by {type(build.pipe.vae).__name__}")
        return {"vae": "random" if build.spec.weights == "random" else build.model.tiny_vae_hub_id}

    build.proofs["tiny_vae"] = proof
    return {}
