"""Two ways in which a model stores its routed experts, behind one interface.

*Fused*: transformers' experts interface (``@use_experts_implementation``), 3-D parameters with one
slice per expert. *Listed*: a ``ModuleList`` or ``ModuleDict`` with one MLP per expert. Both are
recognized by what they hold, never by the name of a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from orchard.models.kernels.frozen_experts import run_frozen
from orchard.models.kernels.grouped_experts import can_group, run_grouped
from orchard.models.kernels.routed_experts import FrozenWeights
from orchard.trees import SlicedTensor

# The names that expert MLPs give their (gate, up, down) or (up, down) projections. The three are
# tried first: a gated MLP also has the two of an ungated one.
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
_UNGATED = (("up_proj", "down_proj"), ("wi", "wo"), ("fc1", "fc2"))
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")


Slice: TypeAlias = tuple[nn.Parameter, Callable[[Tensor], Tensor]]
"""A parameter, and what takes one expert's tensor out of it, or out of its gradient."""
Product: TypeAlias = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]
"""From a parameter's name, what is read, weights (out, in) and a bias to ``functional.linear``."""


class ExpertStorage(Protocol):
    """The routed experts of one block, however they are stored."""

    num_experts: int
    """E, experts in the block."""
    width: int
    """D, the width of what an expert reads and writes."""
    expert_width: int
    """F, the hidden width of one expert."""

    def tensors(self, expert: int) -> dict[str, Tensor]:
        """Return views of one expert's projections, each in (out, in) orientation."""
        ...

    def slices(self, expert: int) -> dict[str, Slice]:
        """Return where each tensor of one expert lives; the names of ``tensors``."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that hold the tensors of all experts."""
        ...

    def activate(self, gate_TF: Tensor | None, up_TF: Tensor) -> Tensor:
        """Apply the nonlinearity between the projections; the result is (T, F)."""
        ...

    def finish(self, y_TD: Tensor) -> Tensor:
        """Apply what follows the down projection of every expert."""
        ...

    def run(self, expert: int, x_TD: Tensor) -> Tensor:
        """Run one expert with weight 1 on every token; the result is (T, D)."""
        ...


class FusedExperts:
    """Experts in 3-D parameters, as transformers' experts interface lays them out."""

    def __init__(self, module: nn.Module, *, refolds: bool = False) -> None:
        """Read the layout's flags from ``module``.

        Args:
            module: An experts module for which ``is_fused`` holds.
            refolds: Whether weights with adapters in them, which are as large as the experts, are
                made again in the backward pass instead of being kept for it.
        """
        self.module = module
        self.refolds = refolds
        self.routed_product: Callable[[int, Tensor], Product] | None = None
        """From an expert and the tokens that it reads to what multiplies them in ``run_routed``;
        the weights it is given carry no gradient. None = ``functional.linear``, and they do."""
        self.begin_products: Callable[[], Callable[[int, Tensor], Product]] | None = None
        """What begins a pass of ``run_routed`` and gives what ``routed_product`` is, where
        something is added to the products with an expert's weights."""
        # Flags that joined the interface after its first release default to what was then fixed.
        self.has_gate = bool(getattr(module, "has_gate", True))
        self.has_bias = bool(getattr(module, "has_bias", False))
        self.has_post_norm = bool(getattr(module, "has_post_expert_norm", False))
        self.is_transposed = bool(getattr(module, "is_transposed", _lies_transposed(module)))
        self.is_concatenated = bool(getattr(module, "is_concatenated", True))
        self.num_experts = self._parameter("down_proj").shape[0]
        self.width, self.expert_width = self._slice("down_proj", 0).shape

    def tensors(self, expert: int) -> dict[str, Tensor]:
        """Return views of one expert's projections; a view of an interleaved layout is strided."""
        return self.split(lambda name: self._parameter(name)[expert])

    def split(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the projections that one expert's slices hold, as views of them.

        Args:
            read: The name of a parameter, ``gate_up_proj`` or ``down_proj_bias``, to the slice.
        """
        places = self._places()
        values = {name: read(name) for name in dict.fromkeys(places.values())}
        return {local: self._take(local, values[name]) for local, name in places.items()}

    def slices(self, expert: int) -> dict[str, Slice]:
        """Return the parameter and the place in it of each of one expert's projections."""

        def view(local: str) -> Callable[[Tensor], Tensor]:
            return lambda values: self._take(local, values[expert])

        return {
            local: (self._parameter(name), view(local)) for local, name in self._places().items()
        }

    def projections(self) -> dict[str, tuple[str, ...]]:
        """Return the projections that each parameter of weights holds, in order."""
        places = {local: name for local, name in self._places().items() if "_bias" not in local}
        return {
            name: tuple(local for local, own in places.items() if own == name)
            for name in dict.fromkeys(places.values())
        }

    def halve(self, values: Tensor, locals_: tuple[str, ...]) -> tuple[Tensor, ...]:
        """Cut (out, in) of a parameter's slice into its projections, as views.

        Args:
            values: One expert's weights in ``nn.Linear`` orientation.
            locals_: An entry of ``projections``.
        """
        return (values,) if len(locals_) == 1 else self._halves(values)

    def _places(self) -> dict[str, str]:
        """Return which parameter holds which projection."""
        places = {}
        for kind in ("", "_bias") if self.has_bias else ("",):
            for local in ("gate_proj", "up_proj") if self.has_gate else ():
                places[local + kind] = "gate_up_proj" + kind
            if not self.has_gate:
                places["up_proj" + kind] = "up_proj" + kind
            places["down_proj" + kind] = "down_proj" + kind
        return places

    def _take(self, local: str, values: Tensor) -> Tensor:
        """Return a projection, as a view of one expert's slice of its parameter."""
        turned = self._turn(values)
        if not self.has_gate or local.startswith("down_proj"):
            return turned
        gate, up = self._halves(turned)
        return gate if local.startswith("gate_proj") else up

    def parameters(self) -> list[nn.Parameter]:
        """Return the 3-D parameters and, where there are any, their biases."""
        return [self._parameter(name) for name in self._names()]

    def _names(self) -> list[str]:
        names = ["gate_up_proj" if self.has_gate else "up_proj", "down_proj"]
        return names + [f"{name}_bias" for name in names if self.has_bias]

    def activate(self, gate_TF: Tensor | None, up_TF: Tensor) -> Tensor:
        """Apply the module's own ``_apply_gate``, or its ``act_fn`` where there is no gate."""
        if gate_TF is None:
            return self._function("act_fn")(up_TF)
        if self.is_concatenated:
            gate_up = torch.cat((gate_TF, up_TF), dim=-1)
        else:
            gate_up = torch.stack((gate_TF, up_TF), dim=-1).flatten(-2)
        return self._function("_apply_gate")(gate_up)

    def run(self, expert: int, x_TD: Tensor) -> Tensor:
        """Run one expert with the fused product of gate and up, as the module does."""
        return self._run(x_TD, lambda name: self._parameter(name)[expert])

    def run_routed(self, x_TD: Tensor, choices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, (T, D), as the module's eager forward.

        Values and gradients are the same. The module indexes its parameters once per expert, and
        each of those indexings has a gradient of the size of the whole parameter; here they are
        unbound once, so that the backward pass writes each gradient once.

        Args:
            x_TD: What the experts read.
            choices_TK: Each token's experts; E stands for none.
            weights_TK: What multiplies their outputs.
        """
        names = dict.fromkeys(self._places().values())
        if self.routed_product is not None:
            with torch.no_grad():
                constant = {name: self._parameter(name).detach() for name in names}
            return self._run_each(constant, x_TD, choices_TK, weights_TK, self.routed_product)
        if self.begin_products is not None:
            held = {name: self._parameter(name) for name in names}
            return self._run_each(held, x_TD, choices_TK, weights_TK, self.begin_products())
        # Taken now: PEFT removes the adapters when the module's forward ends, before the backward.
        folds = {name: self._fold(name) for name in names} if self.refolds else {}
        if torch.is_grad_enabled() and any(_is_trained(fold) for fold in folds.values()):

            def run_folded(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
                held = {name: own() if own else self._parameter(name) for name, own in whole}
                return self._run_each(held, x_TD, choices_TK, weights_TK)

            whole = tuple(folds.items())
            y_TD: Tensor = checkpoint(
                run_folded,
                x_TD,
                weights_TK,
                use_reentrant=False,
                preserve_rng_state=self.is_random,
            )
            return y_TD
        held = {name: self._parameter(name) for name in names}
        is_trained = torch.is_grad_enabled() and any(p.requires_grad for p in held.values())
        if not is_trained and not self.has_post_norm and not self.is_random:
            frozen = self._frozen(held)
            run = run_grouped if can_group(frozen, x_TD) else run_frozen
            return run(frozen, x_TD, choices_TK, weights_TK)
        return self._run_each(held, x_TD, choices_TK, weights_TK)

    def _run_each(
        self,
        held: Mapping[str, Tensor | SlicedTensor],
        x_TD: Tensor,
        choices_TK: Tensor,
        weights_TK: Tensor,
        product_of: Callable[[int, Tensor], Product] | None = None,
    ) -> Tensor:
        parameters = {name: parameter.unbind() for name, parameter in held.items()}
        y_TD = torch.zeros_like(x_TD)
        # One transfer of the choices, not one for each expert.
        for expert in sorted(set(choices_TK.flatten().tolist()) - {self.num_experts}):
            token_P, place_P = torch.where(choices_TK == expert)
            own = {name: slices[expert] for name, slices in parameters.items()}
            product = product_of(expert, token_P) if product_of else None
            own_PD = self._run(x_TD[token_P], own.__getitem__, product)
            weighted_PD = own_PD * weights_TK[token_P, place_P, None]
            y_TD = y_TD.index_add(0, token_P, weighted_PD.to(y_TD.dtype))
        return y_TD

    @property
    def is_random(self) -> bool:
        """Whether the module now drops values at random between its projections (Switch)."""
        dropout = getattr(self.module, "dropout", None)
        return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0

    def _fold(self, name: str) -> nn.Module | None:
        """Return what makes a parameter with its adapters; None where it has none now."""
        if not is_parametrized(self.module, name):
            return None
        return cast(nn.ModuleDict, self.module.parametrizations)[name]

    def _frozen(self, held: Mapping[str, Tensor | SlicedTensor]) -> FrozenWeights:
        first = "gate_up_proj" if self.has_gate else "up_proj"
        turned = [
            held[name].mT if self.is_transposed else held[name] for name in (first, "down_proj")
        ]
        return FrozenWeights(
            turned[0],
            turned[1],
            held.get(f"{first}_bias"),
            held.get("down_proj_bias"),
            self._function("_apply_gate" if self.has_gate else "act_fn"),
        )

    def _run(
        self, x_TD: Tensor, read: Callable[[str], Tensor], product: Product | None = None
    ) -> Tensor:
        product = product or _multiply
        first = "gate_up_proj" if self.has_gate else "up_proj"
        bias = read(f"{first}_bias") if self.has_bias else None
        hidden = product(first, x_TD, self._turn(read(first)), bias)
        hidden_TF = self._function("_apply_gate" if self.has_gate else "act_fn")(hidden)
        bias = read("down_proj_bias") if self.has_bias else None
        return self.finish(product("down_proj", hidden_TF, self._turn(read("down_proj")), bias))

    def finish(self, y_TD: Tensor) -> Tensor:
        """Apply the norm behind the experts, where there is one."""
        return self._function("post_expert_norm")(y_TD) if self.has_post_norm else y_TD

    def _parameter(self, name: str) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.module, name))

    def _slice(self, name: str, expert: int) -> Tensor:
        return self._turn(self._parameter(name)[expert])

    def _turn(self, values: Tensor) -> Tensor:
        return values.t() if self.is_transposed and values.ndim == 2 else values

    def _halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_concatenated:
            return gate_up[: self.expert_width], gate_up[self.expert_width :]
        return gate_up[::2], gate_up[1::2]

    def _function(self, name: str) -> Callable[[Tensor], Tensor]:
        return cast(Callable[[Tensor], Tensor], getattr(self.module, name))


class ListedExperts:
    """Experts as one MLP each, in a ``ModuleList`` or ``ModuleDict``."""

    def __init__(self, module: nn.Module) -> None:
        """Find the projections of the MLPs.

        Args:
            module: An experts module for which ``is_listed`` holds.

        Raises:
            ValueError: The MLPs name their activation in a way this class does not know.
        """
        self.experts = tuple(module.children())
        projections = find_projections(self.experts[0])
        assert projections is not None
        self._projections = projections
        activation = next(
            (a for a in _ACTIVATIONS if callable(getattr(self.experts[0], a, None))), None
        )
        if activation is None:
            raise ValueError(
                f"a listed expert must keep its activation as one of {', '.join(_ACTIVATIONS)}, "
                f"got {type(self.experts[0]).__name__}; choose a model whose experts do"
            )
        self._activation = activation
        self.num_experts = len(self.experts)
        down = self.tensors(0)["down_proj"]
        self.width, self.expert_width = down.shape

    def tensors(self, expert: int) -> dict[str, Tensor]:
        """Return the weights and biases of one MLP themselves."""
        tensors = {}
        for local, attribute in self._projections.items():
            projection = getattr(self.experts[expert], attribute)
            tensors[local] = cast(Tensor, projection.weight)
            if projection.bias is not None:
                tensors[f"{local}_bias"] = cast(Tensor, projection.bias)
        return tensors

    def slices(self, expert: int) -> dict[str, Slice]:
        """Return the weights and biases of one MLP, each a parameter of its own."""
        return {
            name: (cast(nn.Parameter, tensor), lambda values: values)
            for name, tensor in self.tensors(expert).items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Return the weights and biases of all MLPs."""
        experts = range(self.num_experts)
        return [cast(nn.Parameter, p) for e in experts for p in self.tensors(e).values()]

    def activate(self, gate_TF: Tensor | None, up_TF: Tensor) -> Tensor:
        """Return ``act(gate) * up``, or ``act(up)`` where there is no gate."""
        activation = getattr(self.experts[0], self._activation)
        if gate_TF is None:
            return cast(Tensor, activation(up_TF))
        return cast(Tensor, activation(gate_TF)) * up_TF

    def finish(self, y_TD: Tensor) -> Tensor:
        """Return ``y_TD``: nothing follows a listed expert's down projection."""
        return y_TD

    def run(self, expert: int, x_TD: Tensor) -> Tensor:
        """Run the MLP."""
        return cast(Tensor, self.experts[expert](x_TD))


def is_fused(module: nn.Module) -> bool:
    """Say whether ``module`` holds experts behind transformers' experts interface.

    A few families (Step 3) have its parameters, its call and its gate, and no flags.
    """
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    if not (
        hasattr(module, "_apply_gate")
        and all(_num_dims(module, name) == 3 for name in (first, "down_proj"))
    ):
        return False
    is_plain = len(list(module.parameters())) == 2
    return hasattr(module, "is_transposed") or (is_plain and _takes_choices(module))


def _takes_choices(module: nn.Module) -> bool:
    """Say whether a module is called with states, choices and weights."""
    names = list(inspect.signature(type(module).forward).parameters)[1:4]
    return names == ["hidden_states", "top_k_index", "top_k_weights"]


def _lies_transposed(module: nn.Module) -> bool:
    """Say whether 3-D parameters are (E, in, out), told by which widths agree."""
    first, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(first, Tensor) or not isinstance(down, Tensor):
        return False
    return first.shape[1] == down.shape[2] != first.shape[2]


def _multiply(name: str, x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x_TD, weight, bias)


def _is_trained(fold: nn.Module | None) -> bool:
    """Say whether adapters that are folded in get gradients."""
    if fold is None:
        return False
    values = [value for own in fold.modules() for value in vars(own).values()]
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def is_listed(module: nn.Module) -> bool:
    """Say whether ``module`` lists two or more expert MLPs of one type and shape."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    experts = tuple(module.children())
    return (
        len(experts) > 1
        and len({type(expert) for expert in experts}) == 1
        and find_projections(experts[0]) is not None
    )


def is_unknown(module: nn.Module) -> bool:
    """Say whether ``module`` holds stacked experts in a layout that is neither fused nor listed."""
    named = "expert" in type(module).__name__.lower()
    stacked = any(p.ndim == 3 for p in module.parameters(recurse=False))
    return named and stacked and not is_fused(module)


def find_projections(expert: nn.Module) -> dict[str, str] | None:
    """Return what an expert MLP calls its projections, by our names; None where it is no such."""
    for names in (*_GATED, *_UNGATED):
        if all(_num_dims(getattr(expert, name, None), "weight") == 2 for name in names):
            locals_ = ("gate_proj", "up_proj", "down_proj")[-len(names) :]
            return dict(zip(locals_, names, strict=True))
    return None


def _num_dims(module: object, name: str) -> int:
    tensor = getattr(module, name, None)
    return tensor.ndim if isinstance(tensor, Tensor) else 0
