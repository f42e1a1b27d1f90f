"""What all interventions have in common, and what those have that name experts."""

from __future__ import annotations

from dataclasses import KW_ONLY, Field, dataclass, fields
from typing import Any, Literal

from jaxtyping import Bool
from torch import Tensor

from moe_lens.config import MoEConfig
from moe_lens.interventions.arguments import ExpertName, expert_names, layer_numbers, parse_expert
from moe_lens.interventions.expert_reference import SHARED, ExpertReference
from moe_lens.interventions.positions import Pos, as_position, is_mask, places_of
from moe_lens.model.hooked_moe import HookedMoE

Inactive = Literal["raise", "allow"] | None


@dataclass(frozen=True, repr=False)
class Spec:
    """What all interventions have in common: layers and positions.

    Attributes:
        layers: MoE layers, as 3 or `"M3"`; None is those that the experts' names give, and for what names none, every
            MoE layer.
        pos: columns; None is every real token. See `Pos`.
    """

    _: KW_ONLY
    layers: Any = None
    pos: Pos = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            self._set("layers", layer_numbers(self.layers))
        self._set("pos", as_position(self.pos))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """As one would write it: positional arguments first, layers and positions last, no defaults."""
        given = [field for field in fields(self) if getattr(self, field.name) != field.default]
        given.sort(key=lambda field: field.name in ("layers", "pos"))
        plain = [self._shown(field) for field in given if not field.kw_only]
        named = [f"{field.name}={self._shown(field)}" for field in given if field.kw_only]
        return f"{type(self).__name__}({', '.join(plain + named)})"

    __repr__ = __str__

    def _shown(self, field: Field[Any]) -> str:
        value = getattr(self, field.name)
        if isinstance(value, ExpertReference):
            return "..."
        if field.name == "pos":
            return f"<mask of {sum(map(sum, value))} places>" if is_mask(value) else repr(value)
        return repr(value[0]) if isinstance(value, tuple) and len(value) == 1 else repr(value)

    def moe_layers(self, cfg: MoEConfig) -> tuple[int, ...]:
        """The layers that it acts on.

        Raises:
            ValueError: a layer without experts; those that have some are named.
        """
        chosen = cfg.moe_layers if self.layers is None else self.layers
        assert isinstance(chosen, tuple)
        for layer in chosen:
            check_layer(cfg, layer)
        return chosen

    def check(self, model: HookedMoE) -> None:
        """Raise for what makes no sense in this model, whatever else is applied to it.

        Raises:
            ValueError: with the layer, expert, rank or sender named that there is not.
        """
        self.moe_layers(model.cfg)

    def places(self, real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """The positions where it acts, in a batch with these real tokens.

        Raises:
            ValueError: a position past the sequence, padding, or a mask of another shape.
        """
        return places_of(self.pos, real)


@dataclass(frozen=True, repr=False)
class NamedExperts(Spec):
    """An intervention on experts that are named, or numbered with `layers=`.

    Attributes:
        experts: names (`"M1E9"`, `"M1S"` the shared experts), one or several; or numbers (-1 the shared experts) in
            each of `layers`. They are kept as a tuple of names, and `layers` as None.
        inactive: what to do where a named expert is not active.
    """

    experts: Any = ()
    _: KW_ONLY
    inactive: Inactive = None

    def __post_init__(self) -> None:
        super().__post_init__()
        named = expert_names(self.experts, self.layers)  # type: ignore[arg-type]
        check_inactive(self.inactive)
        # Named experts say their layers: one way to say it, and a copy with `dataclasses.replace` stays valid.
        self._set("experts", tuple(map(str, named)))
        if named:
            self._set("layers", None)

    @property
    def named(self) -> tuple[ExpertName, ...]:
        """The experts, taken apart."""
        return tuple(parse_expert(name) for name in self.experts)

    @property
    def must_be_active(self) -> bool:
        """Whether every named expert has to be active at every position."""
        return self.inactive == "raise"

    def moe_layers(self, cfg: MoEConfig) -> tuple[int, ...]:
        if not self.experts:
            return super().moe_layers(cfg)
        layers = tuple(dict.fromkeys(name.layer for name in self.named))
        for layer in layers:
            check_layer(cfg, layer)
        return layers

    def routed_at(self, layer: int) -> tuple[int, ...]:
        """The routed experts named of a layer."""
        return tuple(name.expert for name in self.named if name.layer == layer and name.expert != SHARED)

    def shared_at(self, layer: int) -> bool:
        """Whether the layer's shared experts are named."""
        return ExpertName(layer, SHARED) in self.named

    def check(self, model: HookedMoE) -> None:
        super().check(model)
        for name in self.named:
            if name.expert == SHARED and model.cfg.shared is None:
                raise ValueError(f"there is no {name}: {model.cfg.model_name} has no shared experts")
            if name.expert != SHARED and name.expert >= model.cfg.n_experts:
                raise ValueError(
                    f"there is no expert {name}; a layer of {model.cfg.model_name} has 0..{model.cfg.n_experts - 1}"
                )

    def require_routed(self) -> None:
        """Raises:
        ValueError: no experts, or shared ones, of what acts on routers.
        """
        if not self.experts:
            raise ValueError(f"{type(self).__name__} needs experts")
        for name in self.named:
            if name.expert == SHARED:
                raise ValueError(
                    f"{name} is always active: no router chooses it, and {type(self).__name__} acts on routers"
                )


def check_layer(cfg: MoEConfig, layer: int) -> None:
    """Raises:
    ValueError: it has no experts; the layers that have some are named.
    """
    if layer not in cfg.moe_layers:
        raise ValueError(
            f"layer {layer} has no experts; MoE layers are {', '.join(map(str, cfg.moe_layers))}"
        )


def moe_layers_of(cfg: MoEConfig, layers: Any) -> tuple[int, ...]:
    """Those asked for, rising, None being every MoE layer.

    Raises:
        ValueError: one that has no experts, or comes twice.
    """
    chosen = cfg.moe_layers if layers is None else tuple(sorted(layer_numbers(layers)))
    for layer in chosen:
        check_layer(cfg, layer)
    return chosen


def check_inactive(inactive: Any) -> None:
    if inactive not in ("raise", "allow", None):
        raise ValueError(f"inactive={inactive!r} must be 'raise', 'allow' or None")
