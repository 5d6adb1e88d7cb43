"""Configuration of generation: the network, with presets of released models, and the sampler."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from arl2_jax.config.memory import GatedDeltaConfig, MemorySpec
from arl2_jax.config.rules import require
from arl2_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The fields of a model that a self-attention layer and its memory need.

    Attributes:
      dim: model width C.
      num_heads, head_dim: attention heads H and their width D.
      eps: epsilon of the norms of queries and keys.
      dtype, lora_rank, lora_alpha, lora_init, memory_init, memory_gate: as in `ModelConfig`.
    """

    dim: int
    num_heads: int
    head_dim: int
    eps: float = 1e-6
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_init: Literal["fan_in", "published"] = "fan_in"
    memory_init: Literal["published", "by_block"] = "published"
    memory_gate: Literal["learned", "zero", "local"] = "learned"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for name in ("dim", "num_heads"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        _check_rank("lora_rank", self.lora_rank)
        require(
            self.head_dim % 2 == 0 and self.head_dim >= 6,
            "head_dim",
            self.head_dim,
            "must be even and at least 6",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A causal Wan video transformer, some of whose layers have a linear memory.

    The first group of fields has the names of Wan's own config.json.

    Attributes:
      dim: model width C.
      ffn_dim: inner width of the feed-forward network.
      freq_dim: number of sinusoidal timestep features.
      text_dim, text_len: width and number of the text tokens.
      in_dim, out_dim: latent channels in and out.
      num_heads, num_layers: attention heads and transformer layers.
      eps: epsilon of every norm.
      patch_size: (frames, rows, columns) of latents per token; frames must be 1.
      hybrid_layers: indices of the layers whose memory is the gated delta state; the others keep
        the softmax cache, unless `memories` says otherwise.
      memories: other memories, each a `MemorySpec` or a mapping of its fields; for example
        `({"kind": "window", "settings": {"sink": 3, "frames": 9}},)` for all layers that are not
        hybrid.
      frames_per_block: latent frames denoised together.
      lora_rank, lora_alpha: low-rank updates of the hybrid layers (memory branch and FFN), scaled
        by alpha / rank; with rank 0 there are none.
      lora_init: bound of the uniform factor A at the start: 1 / sqrt(in) for "fan_in",
        1 / sqrt(rank) for "published". Under Adam the latter trains many times as fast at the same
        learning rate.
      memory_init: initial values of a new memory: "published" is ARL2's code, which forgets a block
        of many tokens; "by_block" sets decay, strength and read for the actual size of a block, and
        gives the strength a bias, which ARL2's files cannot represent.
      memory_gate: "learned" is ARL2. The other two are controls without memory: "zero" turns the
        memory branch off, "local" applies its projections to the softmax inside the block.
      delta: settings of the gated delta memory.
      dtype: compute type of activations; parameters and memory states stay float32.
      remat: what training saves of a layer: "none" saves everything, "dots" the results of the
        weight products, "attention" the layer's input and the results of its attention if a kernel
        computes it (GPUs in half precision, TPUs), "layer" only the layer's input.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hybrid_layers: tuple[int, ...] = ()
    memories: tuple[MemorySpec, ...] = ()
    frames_per_block: int = 3
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_init: Literal["fan_in", "published"] = "fan_in"
    memory_init: Literal["published", "by_block"] = "published"
    memory_gate: Literal["learned", "zero", "local"] = "learned"
    delta: GatedDeltaConfig = GatedDeltaConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "attention", "layer"] = "none"

    def __post_init__(self):
        object.__setattr__(self, "hybrid_layers", tuple(sorted(set(self.hybrid_layers))))
        if isinstance(self.delta, Mapping):  # as config.json has it
            object.__setattr__(self, "delta", GatedDeltaConfig(**self.delta))
        specs = tuple(_memory_spec(i, spec) for i, spec in enumerate(self.memories))
        object.__setattr__(self, "memories", specs)
        for name in ("dim", "ffn_dim", "num_heads", "num_layers", "frames_per_block"):
            value = getattr(self, name)
            require(value > 0, f"model.{name}", value, "must be positive")
        _check_rank("model.lora_rank", self.lora_rank)
        require(
            self.dim % self.num_heads == 0 and self.head_dim % 2 == 0 and self.head_dim >= 6,
            "model.dim",
            self.dim,
            f"over model.num_heads={self.num_heads} must give an even head dimension of at least 6",
            "change one of them",
        )
        require(self.freq_dim % 2 == 0, "model.freq_dim", self.freq_dim, "must be even")
        require(
            self.patch_size[0] == 1,
            "model.patch_size",
            self.patch_size,
            "must span one latent frame",
            "set its first entry to 1",
        )
        for name, layers in (("hybrid_layers", self.hybrid_layers), *self._named_layers()):
            outside = [i for i in layers if not 0 <= i < self.num_layers]
            require(
                not outside,
                f"model.{name}",
                None,
                f"has {outside}, outside 0..{self.num_layers - 1}: the model has "
                f"{self.num_layers} layers",
                "remove them",
            )
        self._check_memories()

    def _named_layers(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"memories[{i}].layers", spec.layers) for i, spec in enumerate(self.memories)]

    def _check_memories(self) -> None:
        """Check that every layer has one memory, which suits the model."""
        owner = dict.fromkeys(self.hybrid_layers, "hybrid_layers")
        for name, layers in self._named_layers():
            for layer in layers:
                require(
                    layer not in owner,
                    f"model.{name}",
                    None,
                    f"has layer {layer}, which model.{owner.get(layer)} has too",
                    "a layer has one memory: remove it from one of them",
                )
                owner[layer] = name
        rest = [i for i, spec in enumerate(self.memories) if not spec.layers]
        require(
            len(rest) < 2,
            "model.memories",
            None,
            f"has {len(rest)} entries without layers",
            "name the layers of all but one of them",
        )
        require(
            not rest or len(owner) < self.num_layers,
            f"model.memories[{rest and rest[0]}]",
            None,
            "names no layers, and every layer has another memory",
            "remove it, or name its layers",
        )
        for i, spec in enumerate(self.memories):
            require(
                spec.kind != "gated_delta",
                f"model.memories[{i}].kind",
                "gated_delta",
                "must be set by model.hybrid_layers, which names its layers, and model.delta, "
                "which has its settings",
            )
            try:
                spec.settings.check(self)
            except ConfigError as error:
                raise error.within(f"model.memories[{i}].settings.") from None
            self._check_next_phase(i)

    def _check_next_phase(self, index: int) -> None:
        spec = self.memories[index]
        frame, _ = spec.settings.next_phase() or (self.frames_per_block, None)
        require(
            frame > 0 and frame % self.frames_per_block == 0,
            f"model.memories[{index}].settings",
            None,
            f"ends the first phase of kind={spec.kind} at latent frame {frame}, which is no "
            f"positive multiple of model.frames_per_block={self.frames_per_block}",
            "choose another",
        )

    @property
    def head_dim(self) -> int:
        """Width D of one head."""
        return self.dim // self.num_heads

    @property
    def attention(self) -> AttentionConfig:
        """The fields that self-attention layers and their memories need."""
        names = [field.name for field in dataclasses.fields(AttentionConfig)]
        return AttentionConfig(**{name: getattr(self, name) for name in names})

    def memory_of(self, layer: int) -> MemorySpec:
        """Return kind and settings of a layer's memory, without its layers."""
        if layer in self.hybrid_layers:
            return MemorySpec("gated_delta", self.delta)
        for spec in self.memories:
            if layer in spec.layers:
                return MemorySpec(spec.kind, spec.settings)
        for spec in self.memories:
            if not spec.layers:
                return spec
        return MemorySpec("softmax_cache")

    def phases(self) -> "tuple[tuple[int, ModelConfig], ...]":
        """Return the models that generate a video, each with its first latent frame.

        The first is (0, this model). There are more if a memory has a second phase
        (`MemorySettings.next_phase`); they differ in `memories` alone.
        """
        found = [(0, self)]
        while ends := [e for spec in found[-1][1].memories if (e := spec.settings.next_phase())]:
            begun, model = found[-1]
            first = min(frame for frame, _ in ends)
            require(
                first > begun,
                "model.memories",
                None,
                f"has a phase that begins at latent frame {begun} and ends at {first}",
                "let it end later",
            )
            memories = (_memory_at(spec, first) for spec in model.memories)
            found.append((first, dataclasses.replace(model, memories=tuple(memories))))
        return tuple(found)

    @property
    def converted_layers(self) -> tuple[int, ...]:
        """Indices of the layers to which conversion adds parameters."""
        layers = range(self.num_layers)
        return tuple(i for i in layers if self.memory_of(i).settings.converts)

    def layer_runs(self) -> list[tuple[int, int]]:
        """Return the maximal runs [start, stop) of neighbouring layers with the same memory."""
        runs = []
        for layer in range(self.num_layers):
            if runs and self.memory_of(runs[-1][0]) == self.memory_of(layer):
                runs[-1] = (runs[-1][0], layer + 1)
            else:
                runs.append((layer, layer + 1))
        return runs

    def teacher(self) -> "ModelConfig":
        """Return the model that conversion begins with: a softmax cache in every layer.

        A model without converted layers is its own teacher, with any memories.
        """
        if not self.converted_layers:
            return self
        return dataclasses.replace(self, hybrid_layers=(), memories=())

    @classmethod
    def tiny(cls, **changes: Any) -> "ModelConfig":
        """Return a model for tests and for the example that runs on a laptop."""
        values: dict[str, Any] = dict(
            dim=128, ffn_dim=256, num_heads=4, num_layers=3, freq_dim=64, text_dim=32, text_len=8,
            in_dim=12, out_dim=12, frames_per_block=2, lora_rank=32, lora_alpha=64.0,
            hybrid_layers=(0, 1), remat="layer",
        )  # fmt: skip
        return cls(**values | changes)

    @classmethod
    def wan1p3b(cls, **changes: Any) -> "ModelConfig":
        """Return Wan2.1 T2V 1.3B: 1,418,996,800 parameters; 1560 tokens a frame at 480 x 832."""
        values: dict[str, Any] = dict(
            dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, dtype="bfloat16", remat="attention"
        )
        return cls(**values | changes)

    @classmethod
    def wan14b(cls, **changes: Any) -> "ModelConfig":
        """Return Wan2.1 T2V 14B."""
        values: dict[str, Any] = dict(
            dim=5120,
            ffn_dim=13824,
            num_heads=40,
            num_layers=40,
            dtype="bfloat16",
            remat="attention",
        )
        return cls(**values | changes)


def _check_rank(field: str, rank: int) -> None:
    require(
        rank >= 0,
        field,
        rank,
        "must not be negative, where 0 makes a model without low-rank updates",
    )


def _memory_at(spec: MemorySpec, frame: int) -> MemorySpec:
    """Return the memory of the same layers from a latent frame on."""
    end, following = spec.settings.next_phase() or (None, spec)
    return dataclasses.replace(following, layers=spec.layers) if end == frame else spec


def _memory_spec(index: int, spec: Any) -> MemorySpec:
    """Return a spec unchanged, or make it from a mapping of its fields."""
    if isinstance(spec, MemorySpec):
        return spec
    names = [field.name for field in dataclasses.fields(MemorySpec)]
    require(
        isinstance(spec, Mapping) and "kind" in spec and not {*spec} - {*names},
        f"model.memories[{index}]",
        spec,
        "must be a mapping with kind, and perhaps settings and layers",
    )
    try:
        return MemorySpec(**spec)
    except ConfigError as error:
        raise error.within(f"model.memories[{index}].") from None


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Sampler of a block (flow matching), and the noise of what is remembered.

    Attributes:
      method: "few_step" predicts x0 and re-noises with fresh noise; "euler" integrates the flow.
      timesteps: timesteps of the few-step sampler, in 0..1000 before the shift, falling.
      steps: number of Euler steps.
      shift: levels are shifted to s' = shift s / (1 + (shift - 1) s); training draws its noise
        levels with the same shift.
      guidance: classifier-free guidance scale of the Euler sampler; 1 is off.
      context_noise: noise level s in [0, 1) to which a finished block is noised, with fresh noise,
        before it is written to the memories, at timestep 1000 s; softmax caches and states alike,
        in training as in generation. 0 writes clean blocks.
    """

    method: Literal["few_step", "euler"] = "few_step"
    timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    steps: int = 50
    shift: float = 5.0
    guidance: float = 1.0
    context_noise: float = 0.0

    def __post_init__(self):
        falling = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        require(
            len(self.timesteps) > 0
            and falling
            and 0 < self.timesteps[-1] <= self.timesteps[0] <= 1000,
            "sampler.timesteps",
            self.timesteps,
            "must fall strictly within (0, 1000]",
        )
        require(self.steps > 0, "sampler.steps", self.steps, "must be positive")
        require(self.shift > 0, "sampler.shift", self.shift, "must be positive")
        require(self.guidance >= 1, "sampler.guidance", self.guidance, "must be at least 1 (off)")
        require(
            self.guidance == 1 or self.method == "euler",
            "sampler.guidance",
            self.guidance,
            "needs sampler.method=euler: few-step models carry their guidance in the weights",
        )
        require(
            0 <= self.context_noise < 1,
            "sampler.context_noise",
            self.context_noise,
            "must be a noise level in [0, 1), where 0 writes clean blocks to the memories",
        )
