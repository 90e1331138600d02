"""Matrices of a GPTQ checkpoint in the place of the transformer's plain ones."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from folovllm.kernels.selection import Kernels
from folovllm.model.linear import (
    INITIAL_STD,
    LinearFactory,
    Linears,
    Part,
    Slice,
    plain_linears,
)
from folovllm.setting_checks import is_int

from .gptq import QuantizationConfig, QuantizedMatrix
from .packing import V1, V2, PackedMatrix, unpack_matrix

_HEAD = "lm_head"


class Scheme(NamedTuple):
    """How a checkpoint stores its matrices."""

    config: QuantizationConfig
    checkpoint_format: str

    @classmethod
    def from_checkpoint(cls, quantization: Mapping[str, Any]) -> "Scheme":
        """Reads `quantization_config`; ValueError for what is missing or not of this format."""
        method = quantization.get("quant_method")
        if method != "gptq":
            raise ValueError(
                f"this checkpoint is quantised by {method!r}, and this stage reads 'gptq'; give a "
                f"checkpoint that AutoGPTQ, GPTQModel or `python -m m7_gptq quantize` wrote"
            )
        checkpoint_format = quantization.get("checkpoint_format", V1)
        if checkpoint_format not in (V1, V2):
            raise ValueError(
                f"checkpoint_format must be {V1!r} or {V2!r}, got {checkpoint_format!r}; convert "
                f"the checkpoint to one of them"
            )
        unequal = set(quantization.get("dynamic") or {}) - {_HEAD}
        if unequal:
            raise ValueError(
                f"layers of unequal bits ('dynamic': {', '.join(sorted(unequal))}) are not "
                f"supported; quantise all layers in the same way"
            )
        for name in ("bits", "group_size"):
            if not is_int(quantization.get(name)):
                raise ValueError(
                    f"quantization_config must have a whole number as {name}, got "
                    f"{quantization.get(name)!r}"
                )
        config = QuantizationConfig(
            bits=quantization["bits"],
            group_size=quantization["group_size"],
            sym=bool(quantization.get("sym", True)),
            desc_act=bool(quantization.get("desc_act", False)),
        )
        return cls(config, checkpoint_format)

    @classmethod
    def of_head(cls, quantization: Mapping[str, Any]) -> "Scheme | None":
        """Likewise of the head; None: it is not quantised.

        GPTQModel says under `dynamic` what is different from the layers.
        """
        if not quantization.get(_HEAD):
            return None
        own = (quantization.get("dynamic") or {}).get(_HEAD) or {}
        return cls.from_checkpoint({**quantization, **own, "dynamic": None})


class QuantizedLinear(Part):
    """y = x W^T + b with packed integers.

    On a GPU the kernels multiply with 4-bit words, on a CPU torch's product does in bfloat16;
    elsewhere the weights are written out once, when they are loaded.
    """

    def __init__(
        self,
        scheme: Scheme,
        in_features: int,
        out_features: int,
        has_bias: bool,
        kernels: Kernels,
        like: torch.Tensor,
    ) -> None:
        self.scheme, self.kernels, self.like = scheme, kernels, like
        self.in_features, self.out_features = in_features, out_features
        self.bias = like.new_empty(out_features) if has_bias else None
        self.product: Part | None = None
        """Once the tensors of the checkpoint are all there."""
        self.packed: dict[str, torch.Tensor] = {}
        """Tensors of the checkpoint until then, those of merged matrices side by side."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)  # type: ignore[misc, operator]

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.silu_mul(self(x))

    @property
    def num_parameters(self) -> int:
        """Weights and biases, however they are stored."""
        num_biases = 0 if self.bias is None else self.out_features
        return self.in_features * self.out_features + num_biases

    def targets(self, slices: Sequence[Slice]) -> dict[str, torch.Tensor]:
        self.packed = self._empty(len(slices))
        biases = self.packed["bias"] if self.bias is None else self.bias
        per_word = 32 // self.scheme.config.bits if 32 % self.scheme.config.bits == 0 else 32
        targets: dict[str, torch.Tensor] = {}
        start = 0
        for index, (name, num_outputs) in enumerate(slices):
            end = start + num_outputs
            if start % per_word or num_outputs % per_word:
                raise ValueError(
                    f"{name} has {num_outputs} outputs, whose zero points do not fill words of "
                    f"{self.scheme.config.bits} bits; such a matrix cannot be stored"
                )
            words = slice(*(n * self.scheme.config.bits // 32 for n in (start, end)))
            targets[f"{name}.qweight"] = self.packed["qweight"][:, start:end]
            targets[f"{name}.qzeros"] = self.packed["qzeros"][:, words]
            targets[f"{name}.scales"] = self.packed["scales"][:, start:end]
            targets[f"{name}.g_idx"] = self.packed["g_idx"][index]
            targets[f"{name}.bias"] = biases[start:end]
            start = end
        return targets

    def optional(self, slices: Sequence[Slice]) -> frozenset[str]:
        """Groups where they are neighbours; biases where the model has none (AutoGPTQ writes zeros
        for every matrix)."""
        kinds = {"bias"} if self.bias is None else set()
        if not self.scheme.config.desc_act:
            kinds.add("g_idx")
        return frozenset(f"{name}.{kind}" for name, _ in slices for kind in kinds)

    def _empty(self, num_slices: int) -> dict[str, torch.Tensor]:
        config, device = self.scheme.config, self.like.device
        num_groups = -(-self.in_features // config.columns_per_group(self.in_features))
        shapes = {
            "qweight": (self.in_features * config.bits // 32, self.out_features),
            "qzeros": (num_groups, self.out_features * config.bits // 32),
            "scales": (num_groups, self.out_features),
        }
        empty = {
            name: torch.empty(
                shape, dtype=torch.float16 if name == "scales" else torch.int32, device=device
            )
            for name, shape in shapes.items()
        }
        return {
            **empty,
            "g_idx": self._neighbours().expand(num_slices, -1).clone(),
            "bias": self.like.new_zeros(self.out_features),
        }

    def _neighbours(self) -> torch.Tensor:
        """Groups of columns that are neighbours: [num_inputs] int32."""
        size = self.scheme.config.columns_per_group(self.in_features)
        columns = torch.arange(self.in_features, device=self.like.device)
        return (columns // size).to(torch.int32)

    def finish(self) -> None:
        packed = self.packed
        if packed["bias"].any():
            raise ValueError(
                "this checkpoint has biases where its config.json says that there are none; check "
                "attention_bias and mlp_bias in config.json"
            )
        g_idx = packed["g_idx"]
        if (g_idx != g_idx[0]).any():
            raise ValueError(
                "q, k and v, or gate and up, of this checkpoint have different orders of columns "
                "(g_idx) and cannot be one matrix; quantise without desc_act, or with "
                "static_groups"
            )
        num_groups = len(packed["scales"])
        if g_idx.numel() and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < num_groups:
            raise ValueError(
                f"g_idx of this checkpoint names groups from {int(g_idx.min())} to "
                f"{int(g_idx.max())}, and there are {num_groups}; download it again"
            )
        self._set_matrix(
            unpack_matrix(
                PackedMatrix(packed["qweight"], packed["qzeros"], packed["scales"], g_idx[0]),
                self.scheme.config.bits,
                self.scheme.checkpoint_format,
            )
        )

    def finish_part(self, first_input: int) -> None:
        config = self.scheme.config
        size = config.columns_per_group(self.in_features)
        if config.desc_act:
            raise ValueError(
                "a checkpoint with desc_act has the inputs of a group in several processes, and "
                "they cannot share its matrices; give tensor_parallel_size=1, or quantise without "
                "desc_act"
            )
        if self.in_features % size or self.in_features * config.bits % 32:
            raise ValueError(
                f"each process would have {self.in_features} inputs of a matrix, which are no "
                f"whole groups of {size}; lower tensor_parallel_size, or quantise with smaller "
                f"groups"
            )
        if config.group_size != -1:
            self.packed["g_idx"] -= first_input // size
        self.finish()

    def randomize(self, generator: torch.Generator) -> None:
        """Random integers with the spread that random weights have; biases 0."""
        config, device = self.scheme.config, self.like.device
        size = config.columns_per_group(self.in_features)
        num_groups = -(-self.in_features // size)
        levels = 1 << config.bits
        q = torch.randint(
            0,
            levels,
            (self.out_features, self.in_features),
            dtype=torch.uint8,
            device=device,
            generator=generator,
        )
        scale = INITIAL_STD / ((levels**2 - 1) / 12) ** 0.5
        shape = (num_groups, self.out_features)
        self._set_matrix(
            QuantizedMatrix(
                q=q,
                scales=torch.full(shape, scale, dtype=torch.float16, device=device).float(),
                zeros=torch.full(shape, levels // 2, dtype=torch.int32, device=device),
                g_idx=self._neighbours(),
            )
        )
        if self.bias is not None:
            self.bias.zero_()

    def _set_matrix(self, matrix: QuantizedMatrix) -> None:
        self.packed = {}
        make: type[WrittenOutProduct | Int4Product | CpuInt4Product] = WrittenOutProduct
        if self.scheme.config.bits == 4:
            if self.like.device.type == "cuda" and self.in_features % 8 == 0:
                make = Int4Product
            elif CpuInt4Product.can_compute(matrix, self.like):
                make = CpuInt4Product
        self.product = make(matrix, self.bias, self.kernels, self.like)


class WrittenOutProduct(Part):
    """The weights at the model's type: as fast, and as large, as those of the unquantised model."""

    def __init__(
        self,
        matrix: QuantizedMatrix,
        bias: torch.Tensor | None,
        kernels: Kernels,
        like: torch.Tensor,
    ) -> None:
        self.bias, self.kernels = bias, kernels
        self.weight = matrix.dequantize().to(like.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.linear(x, self.weight, self.bias)


class CpuInt4Product(Part):
    """torch's packed product: the weights at 4 bits, in bfloat16 on a CPU.

    In float32 it is many times slower than the product of written out weights, which is used there.
    """

    _GROUP_SIZES = (32, 64, 128, 256)
    _LEAST_OUTPUTS = 16
    """Outputs of a block in torch's order; there are no others."""

    def __init__(
        self,
        matrix: QuantizedMatrix,
        bias: torch.Tensor | None,
        kernels: Kernels,
        like: torch.Tensor,
    ) -> None:
        groups = matrix.g_idx.to(torch.int64)
        order = torch.argsort(groups, stable=True)
        self.bias, self.group_size = bias, len(groups) // len(matrix.scales)
        self.order = None if bool((groups.diff() >= 0).all()) else order
        q = matrix.q[:, order].to(torch.int32).contiguous()
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        # Of w = (q - 8) * scale + offset.
        offsets = (8 - matrix.zeros) * matrix.scales
        self.scales = torch.stack((matrix.scales, offsets), dim=-1).to(like.dtype)

    @classmethod
    def can_compute(cls, matrix: QuantizedMatrix, like: torch.Tensor) -> bool:
        """Groups must be equal, of a size that the product has."""
        sizes = torch.bincount(matrix.g_idx, minlength=len(matrix.scales)).unique().tolist()
        return (
            like.device.type == "cpu"
            and like.dtype == torch.bfloat16
            and len(matrix.q) % cls._LEAST_OUTPUTS == 0
            and len(sizes) == 1
            and sizes[0] in cls._GROUP_SIZES
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.order is not None:
            x = x[:, self.order]
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.weight, self.group_size, self.scales
        )
        return out if self.bias is None else out + self.bias


class Int4Product(Part):
    """The weights at 4 bits, dequantised in registers."""

    def __init__(
        self,
        matrix: QuantizedMatrix,
        bias: torch.Tensor | None,
        kernels: Kernels,
        like: torch.Tensor,
    ) -> None:
        from . import int4_matmul  # needs triton, which a CPU does not

        self.bias, self.multiply = bias, int4_matmul.linear
        self.weight = int4_matmul.pack_for_kernel(matrix)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, self.weight, self.bias)


def linears_of(quantization: dict[str, Any] | None) -> Linears:
    """Plain matrices for an unquantised checkpoint, packed ones for one of this format."""
    if quantization is None:
        return plain_linears(None)
    head = Scheme.of_head(quantization)
    return Linears(
        _linears(Scheme.from_checkpoint(quantization)), None if head is None else _linears(head)
    )


def random_linears_of(quantization: dict[str, Any] | None) -> Linears:
    """Packed matrices for random weights, of 4 bits where nothing else is said."""
    if quantization is None:
        return Linears(_linears(Scheme(QuantizationConfig(), V1)))
    return linears_of(quantization)


def _linears(scheme: Scheme) -> LinearFactory:
    def make(
        in_features: int,
        out_features: int,
        has_bias: bool,
        kernels: Kernels,
        like: torch.Tensor,
    ) -> QuantizedLinear:
        return QuantizedLinear(scheme, in_features, out_features, has_bias, kernels, like)

    return make
