"""The official code's classes (prlz77/attend-and-rectify) with its names, arguments and state_dict keys, on the fused
path: change one import. load_checkpoint reads its checkpoints, swap puts the fused attention into a model that exists
already. docs/porting.md lists every difference.
"""

import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import modules
from .functional import _check_flags, _check_float, _shape, attend, attention_module, head_hypotheses, rectify
from .losses import mask_penalty
from .models.wrn import WideResNet, _WideNet
from .modules import _check_depth, _check_positive

__all__ = [
    "AttendedLayer",
    "AttentionModule",
    "Checkpoint",
    "Gate",
    "SwapReport",
    "WideResNet",
    "WideResNetAttention",
    "load_checkpoint",
    "swap",
]

_FUNCTIONS = ("softmax", "sigmoid")


# ---------------------------------------------------------------------------------------------- modules


class AttendedLayer(NamedTuple):
    """What AttentionModule returns with mean or tap. Fields that were not asked for, or do not exist, are None."""

    outputs: Tensor
    """The hypotheses: [N, 1, L], mixed by the gates, or [N, K, L] without self_attention; the map's dtype."""
    gates: Tensor | None
    """g over heads, sum 1: [N, K]; None without self_attention. float32 for half maps, else the map's dtype."""
    mean: Tensor | None
    """Spatial mean of the feature map: [N, C], dtype as gates."""
    feature_map: Tensor | None
    """The tapped map: the input's values; let later layers read this one, not the input."""
    reg_loss: Tensor | None
    """What reg_loss() would return; None unless in training with reg_w > 0."""


class _Heads(nn.Module):
    """3×3 heads under the official key: conv.weight [rows, C, 3, 3]. The convolution itself never runs."""

    def __init__(self, in_ch: int, rows: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_ch, rows, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight)


class AttentionModule(nn.Module):
    """One attended layer of the official code: K heads of 3×3, zero padding 1, no biases.

    ℓ_k = W_H[k] * Z,  A_k = softmax over positions of ℓ_k,  o_k = Σ_s A_k ⊙ (W_O[k] * Z),
    t_k = Σ_s A_k ⊙ (W_G[k] * Z),  g = softmax over heads of tanh(t),  o = Σ_k g_k o_k,
    computed as ar_kernels.attention_module does: Z is pooled under the masks, and the labels never meet positions.

    in_ch: C. nlabels: L. nheads: K. reg_w: the weight of reg_loss(). self_attention: False leaves the gates g away.
    Keys: att_head.conv.weight (W_H) and score.conv.weight (W_G) [K, C, 3, 3], out_head.conv.weight (W_O)
        [K·L, C, 3, 3], channel k·L + l; att_head.diag [1, K, K], ones minus identity, which is kept for its key alone:
        the regulariser leaves the diagonal out whatever it holds. No score without self_attention.
    Weights start from kaiming_normal (fan in). Raises TypeError and ValueError naming the argument.
    """

    def __init__(
        self, in_ch: int, nlabels: int, nheads: int = 1, reg_w: float = 0.0, self_attention: bool = True
    ) -> None:
        super().__init__()
        self.in_ch = _check_positive("in_ch", in_ch)
        self.nlabels = _check_positive("nlabels", nlabels)
        self.nheads = _check_positive("nheads", nheads)
        _check_flags(self_attention=self_attention)
        self.reg_w, self.self_attention = _check_reg_w(reg_w), self_attention
        self.att_head = _Heads(in_ch, nheads)
        self.att_head.register_buffer("diag", 1 - torch.eye(nheads).unsqueeze(0))
        self.out_head = _Heads(in_ch, nheads * nlabels)
        if self.self_attention:
            self.score = _Heads(in_ch, nheads)
        self._reg_loss: Tensor | None = None

    def forward(self, feature_map: Tensor, *, mean: bool = False, tap: bool = False) -> Tensor | AttendedLayer:
        """feature_map: [N, C, H, W], any strides → the hypotheses [N, 1, L], or [N, K, L] without self_attention.

        In training with reg_w > 0 the masks' loss is held for reg_loss() to take, else nothing is.

        mean, tap: also return the map's spatial mean, pooled in the same pass, and the map for later layers to read
        (see ar_kernels.attend); then the whole AttendedLayer is returned, reg_loss included, and nothing is held.
        Raises what ar_kernels.attend raises.
        """
        is_regularised = self.training and self.reg_w > 0
        mask_weight = self.att_head.conv.weight
        output_weight = self.out_head.conv.weight.unflatten(0, (self.nheads, self.nlabels))
        if self.self_attention:
            layer = attention_module(
                feature_map, mask_weight, output_weight, self.score.conv.weight,
                masks=is_regularised, mean=mean, tap=tap,
            )  # fmt: skip
            outputs, gates = layer.hypothesis.unsqueeze(1), layer.gates
            masks, average, tapped = layer.masks, layer.mean, layer.feature_map
        else:
            attended = attend(feature_map, mask_weight, masks=is_regularised, mean=mean, tap=tap)
            outputs, gates = head_hypotheses(attended.pooled.to(feature_map.dtype), output_weight), None
            masks, average, tapped = attended.masks, attended.mean, attended.feature_map
        loss = None if masks is None else mask_penalty(masks, self.reg_w)
        if not _is_exporting():  # an exported program has no module to leave anything in
            self._reg_loss = None if mean or tap else loss
        if not (mean or tap):
            return outputs
        return AttendedLayer(outputs, gates, average, tapped, loss)

    def reg_loss(self) -> Tensor:
        """reg_w times ar_kernels.mask_regulariser of the last forward's masks, a scalar; takes it, so that nothing
        is held afterwards. Raises RuntimeError where no forward in training with reg_w > 0 has left any.
        """
        loss, self._reg_loss = self._reg_loss, None
        if loss is None:
            raise RuntimeError(
                "reg_loss must follow a forward in training with reg_w > 0, each once; "
                f"training is {self.training} and reg_w {self.reg_w}"
            )
        return loss

    @staticmethod
    def aggregate(outputs: Sequence[Tensor], gates: Tensor | None, function: str = "softmax") -> Tensor:
        """Mixes the hypotheses of the layers and the network's own: Σ γ_i log softmax(h_i) [N, L], for NLLLoss.

        outputs: tensors [N, m, L] or [N, L], M hypotheses in all. gates: [N, M], as Gate returns them, or None for
        the mean. function: "softmax" of the gates, or "sigmoid", divided by 1e-6 + their sum.
        Raises TypeError and ValueError naming the argument.
        """
        if function not in _FUNCTIONS:
            raise ValueError(f"function must be 'softmax' or 'sigmoid', got {function!r}")
        if not isinstance(outputs, list | tuple):
            raise TypeError(f"outputs must be a list or tuple of tensors, got {type(outputs).__name__}")
        for index, output in enumerate(outputs):
            _check_float(f"outputs[{index}]", output)
        if len(outputs) == 0 or any(output.dim() not in (2, 3) for output in outputs):
            shapes = [list(output.shape) for output in outputs]
            raise ValueError(f"outputs must be tensors [N, m, L] or [N, L], at least one, got {shapes}")
        first = outputs[0]
        for index, output in enumerate(outputs):
            one = output.shape[0], output.shape[-1], output.device
            if one != (first.shape[0], first.shape[-1], first.device):
                raise ValueError(
                    f"outputs[{index}] must have N = {first.shape[0]} and L = {first.shape[-1]} on {first.device} like "
                    f"the first, got {_shape(output)} on {output.device}"
                )
        hypotheses = torch.cat([output if output.dim() == 3 else output.unsqueeze(1) for output in outputs], dim=1)
        if gates is None:
            return rectify(hypotheses, hypotheses.new_zeros(hypotheses.shape[:2]), mix="log", gating=None)
        _check_float("gates", gates)
        if gates.shape != hypotheses.shape[:2] or gates.device != hypotheses.device:
            raise ValueError(
                f"gates must be [N, M] = {_shape(hypotheses[..., 0])} on {hypotheses.device} to match outputs, "
                f"got {_shape(gates)} on {gates.device}"
            )
        return rectify(hypotheses, gates, mix="log", gating=function)

    def extra_repr(self) -> str:
        return (
            f"{self.in_ch}, {self.nlabels}, nheads={self.nheads}, reg_w={self.reg_w}, "
            f"self_attention={self.self_attention}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: all but a loss that awaits reg_loss()."""
        return self.__dict__ | {"_reg_loss": None}


def _is_exporting() -> bool:
    """torch.compiler.is_exporting(), by the flag behind it: Dynamo of torch 2.11 says True in torch.compile too."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


class Gate(nn.Module):
    """The official global gates: tanh(BatchNorm1d(W v)) of the last map's spatial mean v.

    in_ch: C. ngates: D+1, the hypotheses to weigh. gate_depth: 1, or 2 for v ← relu(BatchNorm1d(W' v)) with C//2 rows
    before. Keys: gates.weight, bn.*, and with depth 2 pre_gates.weight, pre_bn.*.
    Raises TypeError and ValueError naming the argument.
    """

    def __init__(self, in_ch: int, ngates: int = 1, gate_depth: int = 1) -> None:
        super().__init__()
        self.in_ch = _check_positive("in_ch", in_ch)
        self.ngates = _check_positive("ngates", ngates)
        if gate_depth not in (1, 2):
            raise ValueError(f"gate_depth must be 1 or 2, got {gate_depth!r}")
        if gate_depth == 2 and in_ch < 2:
            raise ValueError(f"in_ch must be at least 2 with gate_depth=2, got {in_ch}")
        self.gate_depth = gate_depth
        width = in_ch if gate_depth == 1 else in_ch // 2
        self.gates = nn.Linear(width, ngates, bias=False)
        self.bn = nn.BatchNorm1d(ngates)
        nn.init.kaiming_normal_(self.gates.weight)
        if gate_depth == 2:
            self.pre_gates = nn.Linear(in_ch, width, bias=False)
            self.pre_bn = nn.BatchNorm1d(width)
            nn.init.kaiming_normal_(self.pre_gates.weight)

    def forward(self, features: Tensor) -> Tensor:
        """features: the average-pooled last map [N, C], or that map [N, C, H, W] → tanh scores [N, D+1]."""
        _check_float("features", features)
        if features.dim() not in (2, 4) or features.shape[1] != self.in_ch:
            raise ValueError(f"features must be [N, C] or [N, C, H, W], C = {self.in_ch}, got {list(features.shape)}")
        if features.dim() == 4:
            features = features.mean(dim=(2, 3))
        if self.gate_depth == 2:
            features = F.relu(self.pre_bn(self.pre_gates(features)))
        return torch.tanh(self.bn(self.gates(features)))


class WideResNetAttention(_WideNet):
    """The official WARN: a Wide ResNet that attends with 3×3 heads to the outputs of its groups, the last first.

    att0 and att1 see what the next group's first block makes of the outputs of groups 0 and 1, relu(bn0(x)), att2 sees
    relu(bn_g2(x)): at width 10 and 32×32 images 160@32², 320@16² and 640@8².

    depth, width, num_classes, dropout: as WideResNet takes them. attention_depth: how many of att2, att1, att0 there
        are, 0 to 3. attention_width: K. reg_w: the masks' regulariser, as AttentionModule takes it.
    attention_type: "softmax" or "sigmoid" gates, or None for the hypotheses' mean, without output_gate.
    Hypotheses and gates are in the order att2, att1, att0, classifier.

    forward returns (log mix [N, L], reg_loss): train with nll_loss of the one plus the other, which is None unless
    the net is in training with reg_w > 0 and an attention_depth of at least 1.

    The norm bn0 of the net itself, [16], is kept for its keys alone and never applied: what is described of the
    official code gives it no place in the computation (docs/porting.md). It is frozen.
    Raises TypeError and ValueError naming the argument.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        dropout: float,
        attention_depth: int,
        attention_width: int,
        reg_w: float = 0,
        attention_type: str | None = "softmax",
    ) -> None:
        _check_depth(attention_depth, 3)
        _check_positive("attention_width", attention_width)
        _check_reg_w(reg_w)
        if attention_type not in (*_FUNCTIONS, None):
            raise ValueError(f"attention_type must be 'softmax', 'sigmoid' or None, got {attention_type!r}")
        super().__init__(depth, width, num_classes, dropout)
        self.attention_depth, self.attention_width = attention_depth, attention_width
        self.reg_w, self.attention_type = reg_w, attention_type
        self.bn0 = nn.BatchNorm2d(16).requires_grad_(False)
        self._add_rest("bn_g2")
        for group in self._attended_groups():
            layer = AttentionModule(self.channels[group], num_classes, attention_width, reg_w)
            self.add_module(f"att{group}", layer)
        if attention_type is not None:
            self.output_gate = Gate(self.channels[-1], attention_depth + 1)

    def _attended_groups(self) -> range:
        """The last first: 2, 1, 0."""
        return range(2, 2 - self.attention_depth, -1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """images: [N, 3, H, W] → the log mix [N, L], and the regulariser's loss or None."""
        attended: dict[int, AttendedLayer] = {}

        def attend_to(group: int, feature_map: Tensor) -> Tensor:
            if group not in self._attended_groups():
                return feature_map
            layer = self.get_submodule(f"att{group}")(feature_map, tap=True)
            attended[group] = layer
            return layer.feature_map

        last = F.relu(self.bn_g2(self._last_of_groups(images, attend_to)), inplace=True)
        if self.attention_depth == 0:
            mean = last.mean(dim=(2, 3))
        else:
            layer = self.get_submodule("att2")(last, mean=True)
            attended[2] = layer
            mean = layer.mean.to(last.dtype)
        layers = [attended[group] for group in self._attended_groups()]
        hypotheses = [layer.outputs for layer in layers] + [self.classifier(mean)]
        gates = None if self.attention_type is None else self.output_gate(mean)
        output = AttentionModule.aggregate(hypotheses, gates, self.attention_type or "softmax")
        losses = [layer.reg_loss for layer in layers if layer.reg_loss is not None]
        return output, torch.stack(losses).mean() if losses else None


def _check_reg_w(reg_w: float) -> float:
    if not isinstance(reg_w, int | float) or isinstance(reg_w, bool):
        raise TypeError(f"reg_w must be a number, got {type(reg_w).__name__}")
    if not (math.isfinite(reg_w) and reg_w >= 0):
        raise ValueError(f"reg_w must be finite and at least 0, got {reg_w}")
    return reg_w


# ---------------------------------------------------------------------------------------------- checkpoints


class Checkpoint(NamedTuple):
    """What load_checkpoint returns: the rest of the file."""

    epoch: int
    training_time: float
    optimizer: dict[str, Any]
    """The optimizer's state, its parameters in the order of the model's: optimizer.load_state_dict takes it where the
    optimizer was made from model.parameters()."""


def load_checkpoint(model: nn.Module, file: str | os.PathLike[str] | IO[bytes]) -> Checkpoint:
    """Loads a checkpoint of the official code, dict(state_dict, optimizer, training_time, epoch), into model.

    model: one of this module's networks (or of the official code's); inside DataParallel or not. Its state_dict keys
        and the file's must be the same, but for "module." in front of all of the file's (trained on several GPUs) and
        num_batches_tracked, which files older than PyTorch 0.4.1 lack. Weights keep model's dtype and device.
    file: a path, or a file opened for reading. Only tensors and plain values are read: it cannot run code.

    Raises TypeError naming the argument, OSError where the file cannot be opened, ValueError where it is corrupt, holds
    anything else or belongs to another network; model is then unchanged. Warns where the file shows that a norm was in
    use that model never applies (WideResNetAttention.bn0): model's numbers are then not those of the net that was
    trained.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(file, str | os.PathLike) and not hasattr(file, "read"):
        raise TypeError(f"file must be a path or a file opened for reading, got {type(file).__name__}")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    content = _read(file)
    if not isinstance(content, dict):
        raise ValueError(f"file must hold a dict(state_dict, optimizer, training_time, epoch), got {_kind(content)}")
    missing = {"state_dict", "optimizer", "training_time", "epoch"} - content.keys()
    if missing:
        raise ValueError(f"file must hold {', '.join(sorted(missing))} as well, got only {_names(content)}")
    given = content["state_dict"]
    if not isinstance(given, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in given.items()
    ):
        raise ValueError("file must hold tensors by name in its state_dict")
    prefix = "module."
    if given and all(name.startswith(prefix) for name in given):
        given = {name[len(prefix) :]: value for name, value in given.items()}
    state = _matched(model, given)
    optimizer = _reordered(content["optimizer"], given, model)
    model.load_state_dict(state)
    if isinstance(model, WideResNetAttention) and _has_run(state, "bn0"):
        warnings.warn(
            "the checkpoint's bn0 has normalised something, and WideResNetAttention never applies it: its numbers are "
            "not those of the net that was trained (docs/porting.md)",
            stacklevel=2,
        )
    return Checkpoint(content["epoch"], content["training_time"], optimizer)


def _read(file: str | os.PathLike[str] | IO[bytes]) -> object:
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return _read(opened)
    try:
        start = file.tell()
        is_zipped = file.read(4) == b"PK\x03\x04"
        file.seek(start)
        if is_zipped:  # PyTorch itself does not look at the checksums
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is another")
        file.seek(start)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose text tells how to run what is in it
        raise ValueError(
            "file must be a checkpoint of tensors and plain values alone, and has or is something else"
        ) from None
    except Exception as error:  # of a torn file unpickling and unzipping raise whatever they stumble over
        raise ValueError(f"file must be a checkpoint, and could not be read as one: {str(error) or error!r}") from error


def _matched(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """given as model.load_state_dict takes it, or a ValueError that says what does not fit."""
    own = model.state_dict()
    state = {name: value for name, value in own.items() if name.endswith(".num_batches_tracked")} | given
    faults = []
    if lacking := own.keys() - state.keys():
        faults.append(f"lacks {_names(lacking)}")
    if unknown := state.keys() - own.keys():
        faults.append(f"has {_names(unknown)}, which the model does not know")
    for name in sorted(own.keys() & state.keys()):
        if own[name].shape != state[name].shape:
            faults.append(f"has {name} of {list(state[name].shape)} where the model has {list(own[name].shape)}")
        elif state[name] is not own[name] and not _can_be_copied(state[name], own[name]):
            value = state[name]
            faults.append(f"has {name} as {value.dtype} of layout {value.layout} on {value.device}")
    if faults:
        more = f" (and {len(faults) - 4} more)" if len(faults) > 4 else ""
        raise ValueError(f"file must fit the model, but its state_dict {'; '.join(faults[:4])}{more}")
    return state


def _can_be_copied(value: Tensor, own: Tensor) -> bool:
    dense = value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
    return dense and value.is_floating_point() == own.is_floating_point() and not value.is_complex()


def _reordered(optimizer: Any, given: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """The file's optimizer state, whose parameters are in the order of its own net, in the order of model's."""
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise ValueError(f"file must hold an optimizer's state_dict as optimizer, got {_kind(optimizer)}")
    own = [name for name, _ in model.named_parameters()]
    theirs = [name for name in given if name in set(own)]
    if len(groups) != 1 or len(groups[0]["params"]) != len(theirs):
        return optimizer  # parameters chosen by the user: the order is theirs to know
    ids = dict(zip(theirs, groups[0]["params"]))
    return optimizer | {"param_groups": [groups[0] | {"params": [ids[name] for name in own]}]}


def _has_run(state: dict[str, Tensor], norm: str) -> bool:
    mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
    return bool(mean.ne(0).any() or var.ne(1).any())


def _kind(value: object) -> str:
    return f"a dict of {_names(value)}" if isinstance(value, dict) else type(value).__name__


def _names(names: Iterable[Any]) -> str:
    known = sorted(map(str, names))
    return ", ".join(known[:6]) + (f", ... ({len(known)} in all)" if len(known) > 6 else "") or "nothing"


# ---------------------------------------------------------------------------------------------- swap


@dataclass(frozen=True)
class SwapReport:
    """What swap did to a model; print it."""

    model: nn.Module = field(repr=False)
    """The model: the one that was given, or its twin where it was an attention module itself."""
    swapped: dict[str, str]
    """By module name: what became of it."""
    kept: dict[str, str]
    """By module name: why it was left as it is. Modules that have nothing to do with attention are not listed."""

    def __str__(self) -> str:
        lines = [f"swapped {name or '(model)'}: {what}" for name, what in self.swapped.items()]
        lines += [f"kept    {name or '(model)'}: {why}" for name, why in self.kept.items()]
        return "\n".join(lines) or "nothing swapped: no attention found"


class _NotSwapped(Exception):
    """Says why a module that looks like attention is left as it is."""


def swap(model: nn.Module) -> SwapReport:
    """Replaces, in model itself, each attention module by its fused twin, which has the very same Parameters:
    optimizers and state_dict keys stay as they are.

    Two kinds are replaced. Modules built like the official AttentionModule, wherever their class comes from (children
    att_head.conv, out_head.conv and, unless without self-attention, score.conv): by AttentionModule, after both have
    made the same of a small random map in eval mode (on the meta device that cannot be seen, and is left out). And
    ar_kernels' own AttentionModule and GlobalGates that were made with another implementation than "triton": they lose
    it, and run the fastest that can run. Everything else, forwards of networks included, stays.

    Returns SwapReport; its model is model, unless that is an attention module itself. Raises TypeError for anything
    but a Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    holder = nn.Module()
    holder.model = model
    swapped: dict[str, str] = {}
    kept: dict[str, str] = {}
    twins: dict[int, nn.Module | None] = {}
    for path, parent in list(holder.named_modules()):
        for child, module in list(parent._modules.items()):
            name = f"{path}.{child}".removeprefix(".").partition(".")[2]  # as model itself knows it
            try:
                if id(module) not in twins:
                    twins[id(module)] = _twin(module)
                twin = twins[id(module)]
            except _NotSwapped as reason:
                kept[name] = str(reason)
                continue
            if twin is not None:
                parent._modules[child] = twin
                swapped[name] = f"{_where(module)} → {_where(twin)}({twin.extra_repr()})"
    return SwapReport(holder.model, swapped, kept)


def _where(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _twin(module: nn.Module | None) -> nn.Module | None:
    """The fused twin of an attention module, None for a module that has nothing to do with attention."""
    if isinstance(module, AttentionModule):
        raise _NotSwapped("is fused already")
    if isinstance(module, modules.AttentionModule | modules.GlobalGates):
        if module.implementation in (None, "triton"):
            raise _NotSwapped("is fused already")
        module.implementation = None
        return module
    if isinstance(module, Gate) or _has_children(module, "gates", "bn"):
        raise _NotSwapped("reads one vector for each image, not a feature map: there is nothing to fuse")
    if not _has_children(module, "att_head", "out_head"):
        return None
    assert module is not None  # it has children
    heads = [getattr(module, name) for name in ("att_head", "out_head", "score") if _has_children(module, name)]
    sizes = _official_sizes(module, heads)
    with torch.device("meta"):
        twin = AttentionModule(*sizes)
    for own, theirs in zip((twin.att_head, twin.out_head, *([twin.score] if twin.self_attention else [])), heads):
        own.conv, own.training = theirs.conv, theirs.training
    weight = twin.att_head.conv.weight
    diag = getattr(module.att_head, "diag", None)
    twin.att_head.diag = 1 - torch.eye(twin.nheads, device=weight.device).unsqueeze(0) if diag is None else diag
    twin.training = module.training
    _compare(module, twin, weight)
    return twin


def _has_children(module: nn.Module | None, *names: str) -> bool:
    return module is not None and all(isinstance(module._modules.get(name), nn.Module) for name in names)


def _official_sizes(module: nn.Module, heads: list[nn.Module]) -> tuple[int, int, int, float, bool]:
    """(in_ch, nlabels, nheads, reg_w, self_attention) of a module built like the official one."""
    convolutions: list[nn.Conv2d] = []
    for head in heads:
        conv = head._modules.get("conv")
        if not isinstance(conv, nn.Conv2d) or conv.weight.shape[2:] != (3, 3) or conv.bias is not None:
            raise _NotSwapped("its heads are no 3×3 convolutions without bias")
        if (conv.stride, conv.padding, conv.dilation, conv.groups) != ((1, 1), (1, 1), (1, 1), 1):
            raise _NotSwapped("its heads' convolutions have other than stride 1, padding 1, dilation 1 and one group")
        if conv.padding_mode != "zeros":
            raise _NotSwapped(f"its heads' convolutions pad with {conv.padding_mode}, not with zeros")
        convolutions.append(conv)
    for part in module.modules():
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            raise _NotSwapped("hooks are on it or on its heads, which the twin would not call")
    masks, outputs, *scores = convolutions
    nheads, in_ch = masks.out_channels, masks.in_channels
    if outputs.out_channels % nheads or any(score.out_channels != nheads for score in scores):
        rows = [conv.out_channels for conv in (outputs, *scores)]
        raise _NotSwapped(f"its {nheads} attention heads do not go with output and score heads of {rows} channels")
    known = {id(value) for conv in convolutions for value in conv.parameters()}
    if {id(value) for value in module.parameters()} != known or len(list(module.buffers())) > 1:
        raise _NotSwapped("it has parameters or buffers beyond those of the official module")
    reg_w = getattr(module, "reg_w", None)
    if not isinstance(reg_w, int | float):
        raise _NotSwapped("it has no number reg_w, so its regulariser is not known")
    return in_ch, outputs.out_channels // nheads, nheads, reg_w, bool(scores)


_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.1}
"""How far twins may differ, as a share of the largest output: room for TF32 and rounding, not for another formula."""


def _compare(module: nn.Module, twin: AttentionModule, weight: Tensor) -> None:
    """Raises _NotSwapped unless both make the same of a small random map."""
    if weight.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    shape = (2, twin.in_ch, 5, 6)
    probe = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device, weight.dtype)
    training = {part: part.training for part in (*module.modules(), *twin.modules())}
    try:
        module.eval(), twin.eval()
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            expected, got = module(probe), twin(probe)
    except Exception as error:  # whatever a foreign forward raises: it is not the one we know
        raise _NotSwapped(f"it failed on a map {list(shape)}: {type(error).__name__}: {error}") from error
    finally:
        for part, flag in training.items():
            part.training = flag
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        returned = list(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
        raise _NotSwapped(f"it returns {returned} where the official module returns {list(got.shape)}")
    difference, largest = (expected.double() - got.double()).abs().max(), expected.double().abs().max()
    if not difference <= _AGREEMENT[weight.dtype] * largest:
        raise _NotSwapped(f"its formula is another: outputs differ by {difference:.1g}, the largest is {largest:.1g}")
