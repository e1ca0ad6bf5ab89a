"""A tape of what autograd would do, from sizes alone: FLOPs, and which tensors each operation saves for backward."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run.

    Attributes:
        frozen: of frozen parameters.
        trained: of trained parameters, and of embeddings and their output.
        autocast: whether matrix products run in bf16 whatever they are given.
    """

    frozen: torch.dtype
    trained: torch.dtype
    autocast: bool

    @property
    def compute(self) -> int | None:
        """Bytes of an element in a matrix product; None if as it is given."""
        return 2 if self.autocast else None


MIXED = Precision(torch.bfloat16, torch.float32, autocast=True)  # on one device and under DDP
BFLOAT16 = Precision(torch.bfloat16, torch.bfloat16, autocast=False)  # what FSDP2 gathers and computes with
FLOAT32 = Precision(torch.float32, torch.float32, autocast=False)


@dataclass(eq=False)
class Value:
    """A tensor without storage.

    Attributes:
        numel: number of elements.
        width: bytes of each.
        grad: whether it requires a gradient.
        is_parameter: whether saving it takes nothing.
    """

    numel: int
    width: int
    grad: bool
    is_parameter: bool = False

    @property
    def nbytes(self) -> int:
        return self.numel * self.width


@dataclass
class Tape:
    """Follows one forward pass and counts what it and its backward pass take.

    Each method is an operation as torch's autograd has it: it saves an input only for a gradient that is needed.

    Attributes:
        compute: bytes of an element in a matrix product under autocast, else None.
        forward: FLOPs so far.
        backward: FLOPs of its backward pass.
        forward_at_last_save: FLOPs before what was saved last. Non-reentrant checkpointing recomputes as far as that.
        saved: what autograd holds; a tensor that several operations save counts once.
        copies: of weights, in the dtype of matrix products. Autocast keeps them until the forward pass ends.
    """

    compute: int | None = None
    forward: int = 0
    backward: int = 0
    forward_at_last_save: int = 0
    saved: set[Value] = field(default_factory=set)
    copies: dict[Value, Value] = field(default_factory=dict)

    @property
    def saved_bytes(self) -> int:
        """Bytes that autograd holds, copies of weights not among them."""
        return sum(value.nbytes for value in self.saved - set(self.copies.values()))

    @property
    def copied_bytes(self) -> int:
        """Bytes of all copies of weights."""
        return sum(copy.nbytes for copy in self.copies.values())

    @property
    def saved_copied_bytes(self) -> int:
        """Bytes of those copies of weights that autograd holds too."""
        return sum(copy.nbytes for copy in self.copies.values() if copy in self.saved)

    def save(self, *values: Value) -> None:
        self.saved |= {value for value in values if not value.is_parameter}
        self.forward_at_last_save = self.forward

    def cast(self, x: Value, width: int | None) -> Value:
        """A copy in another width; the tensor itself if it has that width."""
        return x if width in (None, x.width) else Value(x.numel, width, x.grad)

    def _operand(self, x: Value) -> Value:
        if not (x.is_parameter and x.grad):  # autocast keeps copies of trained weights only
            return self.cast(x, self.compute)
        if self.compute in (None, x.width):
            return x
        return self.copies.setdefault(x, self.cast(x, self.compute))

    def matmul(self, a: Value, b: Value, flops: int, numel: int, *, autocast: bool = True) -> Value:
        """A product of two tensors, or of many pairs of matrices."""
        if autocast:
            a, b = self._operand(a), self._operand(b)
        if a.grad:
            self.save(b)
        if b.grad:
            self.save(a)
        self.forward += flops
        self.backward += flops * (a.grad + b.grad)
        return Value(numel, a.width, a.grad or b.grad)

    def linear(self, x: Value, weight: Value, features_in: int) -> Value:
        """`x @ weight.T`; a bias saves nothing."""
        rows, features_out = x.numel // features_in, weight.numel // features_in
        return self.matmul(x, weight, 2 * rows * weight.numel, rows * features_out)

    def multiply(self, a: Value, b: Value) -> Value:
        """An elementwise product; `b` may broadcast."""
        if a.grad:
            self.save(b)
        if b.grad:
            self.save(a)
        return Value(max(a.numel, b.numel), max(a.width, b.width), a.grad or b.grad)

    def add(self, a: Value, b: Value) -> Value:
        """A sum, which saves nothing."""
        return Value(a.numel, max(a.width, b.width), a.grad or b.grad)

    def saving_input(self, x: Value) -> Value:
        """An activation function, which saves its input."""
        if x.grad:
            self.save(x)
        return Value(x.numel, x.width, x.grad)

    def saving_result(self, x: Value, width: int | None = None) -> Value:
        """A function that saves its result, such as softmax."""
        result = Value(x.numel, width or x.width, x.grad)
        if x.grad:
            self.save(result)
        return result
