"""AttendRectify: attention on named layers of any backbone, whose code and state_dict keys stay as they are."""

import difflib
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from .functional import AttentionOutput, _check_flags, rectify
from .modules import AttentionModule, GlobalGates, _check_kernel_size, _check_mixing, _check_positive, _is_int
from .reference import global_gates as global_gates_of

DRY_RUN_SIZES = (64, 224)
"""Sides of the square inputs on which a backbone is tried, in this order, when no example_input is given."""

_LARGER = 64
"""By how many positions the sides of an input grow where one run does not tell which dimension has a map's channels."""

_REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError)
"""What backbones raise on an input of a size that they do not take."""

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Rectified(NamedTuple):
    """What AttendRectify and attentive models return with return_details=True, for D attended layers in their order."""

    output: Tensor
    """The rectified output: [N, L]; float32 for half hypotheses."""
    hypotheses: Tensor
    """h: the attended layers' hypotheses and, last, the network's own output: [N, D+1, L]."""
    global_gates: Tensor
    """γ over the hypotheses, as gating makes it: [N, D+1]."""
    head_gates: tuple[Tensor, ...]
    """g of each attended layer over its heads, sum 1: D tensors [N, K]."""
    masks: tuple[Tensor, ...]
    """A of each attended layer, 1 when summed over positions: D tensors [N, K, H, W] ([N, K, S] for maps of rank 3)."""


def rectified(
    attended: Sequence[AttentionOutput],
    own: Tensor,
    scores: Tensor | None,
    mix: str,
    gating: str | None,
    details: bool,
) -> Tensor | Rectified:
    """Mixes the hypotheses of the attended layers and the network's own output [N, L]; see ar_kernels.rectify.

    scores: [N, D+1] from the global gates, or None where γ does not depend on them (gating=None, or D = 0).
    """
    hypotheses = [layer.hypothesis.to(own.device) for layer in attended] + [own]
    if scores is None:
        dtype = torch.float64 if own.dtype == torch.float64 else torch.float32
        scores, gating = own.new_zeros((own.shape[0], len(hypotheses)), dtype=dtype), None
    scores = scores.to(own.device)
    output = rectify(hypotheses, scores, mix=mix, gating=gating)
    if not details:
        return output
    gates = global_gates_of(scores, gating)
    stacked = torch.stack([hypothesis.to(output.dtype) for hypothesis in hypotheses], dim=1)
    return Rectified(
        output,
        stacked,
        gates,
        tuple(layer.gates for layer in attended),
        tuple(layer.masks for layer in attended if layer.masks is not None),
    )


class AttendRectify(nn.Module):
    """A backbone that attends to its own layers and rectifies its output (paper: "Attend and Rectify", ECCV 2018).

    Each named layer's feature map gets an AttentionModule; together with the network's own output that makes D+1
    hypotheses (layers in the order given, the network last), which the global gates mix. The global gates' head of
    D+1 masks looks at the attended map that the backbone computes last, in the same pass as that map's own heads.

    backbone: any module that maps images to class scores [N, L]. It is not copied. Forward hooks are put on its
        layers, for as long as this module lives: calling the backbone itself still runs no attention, and its
        state_dict keys stay as they are.
    layers: names of submodules, as backbone.named_modules() gives them, each returning one feature map
        [N, C, H, W] or [N, C, S], or with channels last, in one call per forward.
    num_classes: L, the width of the backbone's output. heads: K, the attention width.
    mix: "logit" Σ γ_i h_i (the paper's): train with CrossEntropyLoss. "prob" and "log": the output is (a bound of) a
        log-probability: train with NLLLoss. gating: "softmax", "sigmoid" or None (γ_i = 1/(D+1), no global gates).
    kernel_size, gated: of the attention heads, as AttentionModule takes them.
    example_input: what the backbone is called with once or twice at construction (eval mode, no gradients; random
        state, training flags and normalisation statistics stay untouched) to find channel counts; a tensor, or a tuple
        of arguments. Default: zeros of 64×64, then 224×224, with the channels of the backbone's first convolution.
    channel_dim: the channels' dimension in the attended maps, 1 or -1; None finds it out.

    Hooks of others on an attended layer, put there later, see its map as the backbone goes on with it: gradients there
    are without the attention's own share (Grad-CAM: hook with prepend=True, or before this is made).
    A map that the backbone later overwrites in place (VGG: a convolution before ReLU(inplace=True)) is attended as its
    layer left it; the backbone goes on with a copy. A layer inside torch.utils.checkpoint needs use_reentrant=False;
    its map is then kept for the attention. Under torch.compile such a layer breaks the graph unless
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint is set; other backbones compile as one graph.
    Parameters are made on each map's device and in its dtype; in float32 for half-precision maps of a backbone with
    float32 parameters, which autocasts inside.
    state_dict keys: backbone.*, attention.<i>.* with i the place in layers, global_gates.*.
    Raises TypeError and ValueError naming the argument or the layer.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Sequence[str],
        num_classes: int,
        heads: int = 4,
        *,
        mix: str = "logit",
        gating: str | None = "softmax",
        kernel_size: int = 1,
        gated: bool = True,
        example_input: Tensor | tuple[Any, ...] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        super().__init__()
        _check_layers(backbone, layers)
        self.num_classes = _check_positive("num_classes", num_classes)
        self.heads = _check_positive("heads", heads)
        _check_mixing(mix, gating)
        _check_kernel_size(kernel_size)
        _check_flags(gated=gated)
        if channel_dim is not None and (not _is_int(channel_dim) or channel_dim not in (1, -1)):
            raise ValueError(f"channel_dim must be 1, -1 or None, got {channel_dim!r}")
        self.layers, self.mix, self.gating = tuple(layers), mix, gating
        maps, self._last = _dry_run(backbone, self.layers, num_classes, example_input, channel_dim)
        self._channels_last = tuple(found.channels_last for found in maps)
        self._overwritten = tuple(found.overwritten for found in maps)
        self.backbone = backbone
        self.attention = nn.ModuleList(
            AttentionModule(
                found.channels,
                num_classes,
                heads,
                gated=gated,
                kernel_size=kernel_size,
                device=found.device,
                dtype=found.dtype,
            )
            for found in maps
        )
        last = maps[self._last]
        self.global_gates = None
        if gating is not None:
            self.global_gates = GlobalGates(
                last.channels, len(maps) + 1, kernel_size=kernel_size, device=last.device, dtype=last.dtype
            )
        # Hooks find the forward they belong to by this token. deepcopy, pickle and DataParallel keep token and hooks
        # together, so copies never meet each other's calls.
        self._token = object()
        self._hooks = _Hooks(
            backbone.get_submodule(name).register_forward_hook(_Hook(self._token, index))
            for index, name in enumerate(self.layers)
        )

    def forward(self, *inputs: object, return_details: bool = False, **keywords: object) -> Tensor | Rectified:
        """Calls the backbone with inputs and keywords; returns the rectified output [N, L], or Rectified with all that
        led to it if return_details (its masks are differentiable too). mix says which loss goes with the output.
        """
        _check_flags(return_details=return_details)
        call = _Call(self, return_details)
        with _running(call):
            own = self.backbone(*inputs, **keywords)
        outputs = call.finish()
        if not isinstance(own, Tensor):
            raise TypeError(f"backbone must return a tensor [N, {self.num_classes}], got {type(own).__name__}")
        return rectified(outputs, own, outputs[self._last].global_scores, self.mix, self.gating, return_details)

    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}, mix={self.mix!r}, gating={self.gating!r}"


# ---------------------------------------------------------------------------------------------- one forward


class _Call:
    """One forward of an AttendRectify: what its hooks have found so far."""

    def __init__(self, wrapper: AttendRectify, details: bool) -> None:
        self.wrapper, self.details = wrapper, details
        self.outer = _calls.innermost
        self.gradients = torch.is_grad_enabled()
        self.outputs: list[AttentionOutput | None] = [None] * len(wrapper.layers)
        self.deferred: list[Tensor | None] = [None] * len(wrapper.layers)
        self.versions: list[tuple[str, Tensor, int]] = []

    def fired(self, index: int, inputs: tuple[Any, ...], returned: object) -> Tensor | None:
        """Attends what layer `index` returned; returns what the backbone goes on with, None for the same tensor."""
        wrapper, name = self.wrapper, self.wrapper.layers[index]
        if self.outputs[index] is not None or self.deferred[index] is not None:
            raise RuntimeError(f"layer {name!r} ran twice in one forward, but once when AttendRectify was made")
        if not isinstance(returned, Tensor):
            raise TypeError(f"layer {name!r} must return one tensor, got {type(returned).__name__}")
        if self.gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {name!r} ran with gradients off inside a forward with gradients on, so its attention could not "
                "train; use torch.utils.checkpoint with use_reentrant=False, and requires_grad_(False) to freeze layers"
            )
        overwritten = wrapper._overwritten[index]
        if self.gradients and not torch.compiler.is_compiling():
            if not overwritten and not returned.is_inference():
                self.versions.append((name, returned, returned._version))
            if _saved_tensors_are_hooked():
                # torch.utils.checkpoint runs this layer again in backward, without this call, and must then save the
                # same tensors: so nothing is computed in its region, and the attention comes after the backbone, which
                # may have overwritten this very tensor until then.
                self.deferred[index] = returned.clone() if overwritten else returned
                return None
            if overwritten and any([isinstance(value, Tensor) and _share_memory(value, returned) for value in inputs]):
                # An Identity, a Dropout that does nothing: the backbone still has the tensor that it will overwrite.
                self.attend(index, returned.clone(), tap=False)
                return None
        following = self.attend(index, returned, tap=True)
        return following.clone() if overwritten else following

    def attend(self, index: int, returned: Tensor, tap: bool) -> Tensor:
        """Runs the attention of layer `index` on its map; returns the map, tapped if asked for."""
        wrapper = self.wrapper
        channels_last = wrapper._channels_last[index]
        output = wrapper.attention[index](
            returned.movedim(-1, 1) if channels_last else returned,
            global_gates=wrapper.global_gates if index == wrapper._last else None,
            masks=self.details,
            tap=tap and returned.requires_grad,
        )
        self.outputs[index] = output
        if output.feature_map is None:
            return returned
        return output.feature_map.movedim(1, -1) if channels_last else output.feature_map

    def finish(self) -> list[AttentionOutput]:
        """The attention of every layer, once the backbone has returned."""
        for name, feature_map, version in self.versions:
            if feature_map._version != version:
                raise RuntimeError(_OVERWRITTEN.format(repr(name)))
        for index, name in enumerate(self.wrapper.layers):
            deferred = self.deferred[index]
            if deferred is not None:
                self.attend(index, deferred, tap=False)
            if self.outputs[index] is None:
                hooks = self.wrapper.backbone.get_submodule(name)._forward_hooks.values()
                if not any([isinstance(hook, _Hook) and hook.token is self.wrapper._token for hook in hooks]):
                    raise RuntimeError(
                        f"layer {name!r} is another module than when AttendRectify was made: wrap it last"
                    )
                told = f"layer {name!r} did not run in this forward, but did when AttendRectify was made"
                raise RuntimeError(told + _hint(self.wrapper.backbone))
        return [output for output in self.outputs if output is not None]


class _Calls(threading.local):
    def __init__(self) -> None:  # in each thread; of a default on the class torch 2.11's Dynamo sees nothing else
        self.innermost: _Call | None = None


_calls = _Calls()


_OVERWRITTEN = (
    "the map of layer {} was overwritten in place by a later layer, which did not happen when AttendRectify was made "
    "(in eval mode, with nn.Dropout acting); give what follows it inplace=False"
)


@contextmanager
def _running(call: _Call) -> Iterator[None]:
    _calls.innermost = call
    try:
        yield
    except RuntimeError as error:
        if "view and is being modified inplace" not in str(error):
            raise
        # The tap is a view of the map: autograd itself stops whoever overwrites it, but cannot name the layer.
        layers = " or ".join(map(repr, call.wrapper.layers))
        other = f"Or the backbone overwrites a view of its own: {error}"
        raise RuntimeError(f"{_OVERWRITTEN.format(layers)}. {other}") from error
    finally:
        _calls.innermost = call.outer


class _Hook:
    """The forward hook on one attended layer: does nothing but in a forward of the AttendRectify that put it there."""

    def __init__(self, token: object, index: int) -> None:
        self.token, self.index = token, index

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], returned: object) -> Tensor | None:
        call = _calls.innermost
        while call is not None and call.wrapper._token is not self.token:
            call = call.outer
        return None if call is None else call.fired(self.index, inputs, returned)


class _Hooks:
    """The handles of an AttendRectify's hooks, which go with it."""

    def __init__(self, handles: Iterable[RemovableHandle]) -> None:
        self.handles = tuple(handles)

    def __del__(self) -> None:
        for handle in self.handles:
            handle.remove()


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """As autograd knows it: functorch's tensors have no storage to ask."""
    bases = [tensor if tensor._base is None else tensor._base for tensor in (one, other)]
    return bases[0] is bases[1]


def _saved_tensors_are_hooked() -> bool:
    try:
        with disable_saved_tensors_hooks("probe"):
            return False
    except RuntimeError:
        return True


# ---------------------------------------------------------------------------------------------- the dry run


class _Map(NamedTuple):
    """What the dry run found out about one layer's feature map."""

    channels: int
    channels_last: bool
    overwritten: bool
    device: torch.device
    dtype: torch.dtype  # of the attention's parameters


def _check_layers(backbone: object, layers: object) -> None:
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence of names, got {type(layers).__name__}")
    if len(layers) == 0:
        raise ValueError("layers must name at least one layer, got none")
    names = [name for name, _ in backbone.named_modules(remove_duplicate=False) if name]
    for name in layers:
        if not isinstance(name, str):
            raise TypeError(f"layers must hold names, got {type(name).__name__}")
        if name not in names:
            hint = f"it has {', '.join(names[:10])}, ..." if names else "it has none"
            if close := difflib.get_close_matches(name, names, n=3):
                hint = f"did you mean {', '.join(map(repr, close))}?"
            raise ValueError(f"layers must name submodules of the backbone, got {name!r}; {hint}")
        if layers.count(name) > 1:
            raise ValueError(f"layers must not repeat a name, got {name!r} {layers.count(name)} times")


def _dry_run(
    backbone: nn.Module,
    layers: tuple[str, ...],
    num_classes: int,
    example_input: Tensor | tuple[Any, ...] | None,
    channel_dim: int | None,
) -> tuple[list[_Map], int]:
    """Runs the backbone; returns what it found about each layer's map, and the layer that ran last."""
    if example_input is None:
        inputs, returned, fired, versions = _first_run(backbone, layers)
    else:
        if not isinstance(example_input, (Tensor, tuple)):
            raise TypeError(f"example_input must be a tensor or a tuple, got {type(example_input).__name__}")
        inputs = example_input if isinstance(example_input, tuple) else (example_input,)
        returned, fired, versions = _observe(backbone, layers, inputs)
    for index, name in enumerate(layers):
        if fired.count(index) != 1:
            times = "never ran" if index not in fired else f"ran {fired.count(index)} times"
            raise ValueError(f"layers must run once in each forward, but {name!r} {times}{_hint(backbone)}")
        _check_returned(name, returned[index])
        _check_batch(name, returned[index], inputs)
    _check_own_output(returned[-1], inputs, num_classes)

    shapes: list[tuple[tuple[int, ...], ...]] = [(tuple(feature_map.shape),) for feature_map in returned[:-1]]
    image = next((value.shape for value in inputs if isinstance(value, Tensor) and value.dim() > 2), ())
    if channel_dim is None and any([_channels_last(known, image) is None for known in shapes]):
        with suppress(*_REFUSALS):  # a backbone of one input size: then the shapes of one run must do
            *again, _ = _observe(backbone, layers, tuple([_larger(value) for value in inputs]))[0]
            if all([isinstance(feature_map, Tensor) for feature_map in again]):  # each layer ran
                shapes = [known + (tuple(feature_map.shape),) for known, feature_map in zip(shapes, again, strict=True)]
    maps: list[_Map] = []
    for name, feature_map, known in zip(layers, returned[:-1], shapes, strict=True):
        channels_last = _channels_last(known, image) if channel_dim is None else channel_dim == -1
        if channels_last is None:
            raise ValueError(
                f"channel_dim must be given: the channels of layer {name!r} could be dimension 1 or -1 of its map "
                f"{list(known[0])} (input {list(image)})"
            )
        channels = feature_map.shape[-1 if channels_last else 1]
        overwritten = _version(feature_map) != versions[len(maps)]
        dtype = _weight_dtype(backbone, feature_map.dtype)
        maps.append(_Map(channels, channels_last, overwritten, feature_map.device, dtype))
    return maps, fired[-1]


def _weight_dtype(backbone: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Of attention parameters beside maps of this dtype."""
    has_float32 = any(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    return torch.float32 if has_float32 and dtype.itemsize == 2 else dtype


def _first_run(backbone: nn.Module, layers: tuple[str, ...]) -> tuple[Any, ...]:
    """inputs of the first size that the backbone accepts, and of them what _observe returns."""
    failures: list[str] = []
    for size in DRY_RUN_SIZES:
        inputs = (_square(backbone, size),)
        try:
            return inputs, *_observe(backbone, layers, inputs)
        except _REFUSALS as error:
            failures.append(f"at {size}×{size} {type(error).__name__}: {error}")
    raise ValueError(f"example_input must be given: the backbone did not run on zeros, {'; '.join(failures)}")


def _square(backbone: nn.Module, size: int) -> Tensor:
    for module in backbone.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.in_channels > 0:
            spatial = (size,) * (module.weight.dim() - 2)
            # Two images: a backbone that squeezes a batch of one away would return [L].
            return module.weight.new_zeros((2, module.in_channels, *spatial), requires_grad=False)
    raise ValueError(
        "example_input must be given: the backbone has no Conv2d or Conv1d to take the input's channels from"
    )


def _larger(value: object) -> object:
    """Of an image [N, C, H, W] or [N, C, S], zeros for a larger one; anything else as it is."""
    if not isinstance(value, Tensor) or value.dim() < 3:
        return value
    return value.new_zeros((*value.shape[:2], *[size + _LARGER for size in value.shape[2:]]))


def _observe(
    backbone: nn.Module, layers: tuple[str, ...], inputs: tuple[Any, ...]
) -> tuple[list[Any], list[int], list[int]]:
    """One forward: what each layer returned (last: the backbone), which layers fired in which order, map versions."""
    returned: list[Any] = [None] * (len(layers) + 1)
    versions = [-1] * len(layers)
    fired: list[int] = []

    def watch(index: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
            fired.append(index)
            returned[index] = output
            versions[index] = _version(output)

        return backbone.get_submodule(layers[index]).register_forward_hook(hook)

    training = {module: module.training for module in backbone.modules()}
    tensors = [value for value in (*inputs, *backbone.parameters()) if isinstance(value, Tensor)]
    devices = {tensor.device for tensor in tensors}
    gpus = [device for device in devices if device.type == "cuda"]
    handles = [watch(index) for index in range(len(layers))]
    try:
        for module in training:
            # A dropout in place overwrites its input only in training mode, and that is to be seen here.
            module.training = isinstance(module, _DROPOUTS) and module.inplace
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(gpus))
            for kind in {device.type for device in devices}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            returned[-1] = backbone(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    return returned, fired, versions


def _version(output: object) -> int:
    """How often it was written in place; -1 where that is not counted."""
    return output._version if isinstance(output, Tensor) and not output.is_inference() else -1


def _hint(backbone: nn.Module) -> str:
    """Dynamo leaves hooks out of what it compiled before they were there."""
    modules = list(backbone.modules())
    if any(type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None for module in modules):
        return "; torch.compile saw the backbone before it had hooks: wrap it uncompiled, and compile the AttendRectify"
    return ""


def _check_returned(name: str, returned: object) -> None:
    if not isinstance(returned, Tensor):
        raise TypeError(f"layer {name!r} must return one tensor, got {type(returned).__name__}; name a layer inside it")
    if not returned.is_floating_point():
        raise TypeError(f"layer {name!r} must return a floating tensor, got {returned.dtype}")
    if returned.dim() not in (3, 4):
        raise ValueError(
            f"layer {name!r} must return a feature map [N, C, H, W] or [N, C, S], got {list(returned.shape)}"
        )


def _batch(inputs: tuple[Any, ...]) -> int | None:
    return next((value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim() > 0), None)


def _check_batch(name: str, feature_map: Tensor, inputs: tuple[Any, ...]) -> None:
    batch = _batch(inputs)
    if batch not in (None, feature_map.shape[0]):
        raise ValueError(
            f"layer {name!r} must return a map whose first dimension is the batch's {batch} images, got "
            f"{list(feature_map.shape)}"
        )


def _check_own_output(output: object, inputs: tuple[Any, ...], num_classes: int) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(f"backbone must return a tensor [N, {num_classes}], got {type(output).__name__}")
    batch = _batch(inputs)
    if output.dim() != 2 or output.shape[1] != num_classes or batch not in (None, output.shape[0]):
        raise ValueError(f"backbone must return [N, num_classes] = [{batch}, {num_classes}], got {list(output.shape)}")


def _channels_last(shapes: tuple[tuple[int, ...], ...], image: tuple[int, ...]) -> bool | None:
    """Whether a layer's maps (their shapes in one or two runs) have channels last; None where that cannot be told.

    Channels are the dimension that does not change with the size of the input. Where that does not tell, they are the
    first if the others have the proportions of the input and the first two have not.
    """
    first = shapes[0]
    if len(shapes) == 2:
        changes = [a != b for a, b in zip(first[1:], shapes[1][1:], strict=True)]
        if all(changes[1:]) and not changes[0]:
            return False
        if all(changes[:-1]) and not changes[-1]:
            return True
    if len(first) != 4 or len(image) != 4:
        return None
    height, width = image[2:]
    # Strides round the sides of a map up or down: within one position of the proportions of the input.
    rounding = 0 if height == width else max(height, width)
    first_is_channels = abs(first[2] * width - first[3] * height) <= rounding
    last_is_channels = abs(first[1] * width - first[2] * height) <= rounding
    return False if first_is_channels and not last_is_channels else None
