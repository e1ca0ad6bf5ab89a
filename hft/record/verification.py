"""`hft verify`: proof that what a manifest calls frozen is bit-identical to the base, and all parameters are listed."""

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from hft.errors import HFTError, shorten
from hft.model.anatomy import meta_model
from hft.model.weights import Weights, as_bytes, checksum, local_folder, weights_of
from hft.record.manifest import MANIFEST_NAME, Manifest
from hft.selection.masks import MASKS_NAME, Mask, Masks, frozen_values

Tensors = Mapping[str, torch.Tensor]
ADAPTER_NAME = "adapter_model.safetensors"  # peft.utils.SAFETENSORS_WEIGHTS_NAME, without importing peft


def main(arguments: Sequence[str]) -> int:
    """Compare an output folder with its base; 1 if something differs that should not."""
    parser = argparse.ArgumentParser(prog="hft verify", description="Compare a model's frozen half with its base.")
    parser.add_argument("out", metavar="OUT", help="folder of a run, a checkpoint or a reset")
    parser.add_argument("--base", help="the base, if it is not where the manifest says: a folder or a Hub id")
    options = parser.parse_args(arguments)
    found = verify_folder(options.out, options.base)
    print(found.report())
    return 0 if found.ok else 1


@dataclass
class Verification:
    """What `verify` found; each list holds tensor names."""

    against: str  # what the frozen tensors were compared with
    identical: list[str] = field(default_factory=list)  # frozen and bit-identical to the base
    broken: dict[str, str] = field(default_factory=dict)  # frozen, yet different from the base or missing, and why
    changed: list[str] = field(default_factory=list)  # trained and different from the base
    unchanged: list[str] = field(default_factory=list)  # trained, yet bit-identical to the base: worth a look
    new: list[str] = field(default_factory=list)  # trained, and not in the base, such as the head of a reward model
    lost: list[str] = field(default_factory=list)  # of the base, or trained, and missing from the checkpoint
    parts: list[str] = field(default_factory=list)  # those among `identical` that are frozen in part
    unlisted: list[str] = field(default_factory=list)  # in the checkpoint, and not in the manifest
    not_finite: list[str] = field(default_factory=list)  # trained tensors that hold NaN or infinity
    tuned: str = ""  # of a Half-Reset, in which nothing has trained, how what should have stayed tuned compares
    strayed: dict[str, str] = field(default_factory=dict)  # should have stayed tuned, yet different, and why

    @property
    def ok(self) -> bool:
        return self.num_wrong == 0

    @property
    def num_wrong(self) -> int:
        return sum(map(len, (self.broken, self.lost, self.unlisted, self.strayed)))

    def counts(self) -> dict[str, int]:
        """The number of tensors by finding."""
        return {name: len(value) for name, value in vars(self).items() if isinstance(value, list | dict)}

    def report(self) -> str:
        """The result for people, one finding per line."""
        trained = len(self.changed) + len(self.unchanged)
        moved = f"{len(self.changed)} of {trained} tensors changed" if trained else "not compared: no base found"
        lines = [f"frozen:  {self._identical()}", f"trained: {moved}"]
        if self.tuned:
            lines = [f"reset: {self._identical()}", f"tuned: {self.tuned}"]
        notes = {"new, the base has none": self.new, "bit-identical to the base though trained": self.unchanged}
        notes["WARNING: NaN or infinity"] = self.not_finite
        lines += [f"  {what}: {shorten(names, most=3)}" for what, names in notes.items() if names]
        if self.unchanged and not self.changed:
            lines.append("  WARNING: nothing has moved; is the learning rate too low for the dtype?")
        verdict = "passed" if self.ok else f"FAILED: {self.num_wrong} tensors differ, are missing or are not listed"
        lines += [f"  MISMATCH {name}: {why}" for name, why in list((self.broken | self.strayed).items())[:10]]
        lines += [f"  MISSING {name}" for name in self.lost[:10]]
        lines += [f"  UNLISTED {name}: the manifest says neither frozen nor trained" for name in self.unlisted[:10]]
        return "\n".join([*lines, f"verify {verdict}"])

    def _identical(self) -> str:
        total = len(self.identical) + len(self.broken)
        parts = f", {len(self.parts)} of them part of a tensor" if self.parts else ""
        return f"{len(self.identical)} of {total} tensors bit-identical to {self.against}{parts}"


def verify_tensors(
    out: Tensors,
    frozen: Mapping[str, str],
    trained: Iterable[str],
    base: Tensors | None,
    *,
    masks: Mapping[str, Mask] | None = None,
    against: str = "the base",
) -> Verification:
    """Compare a checkpoint with its base, tensor by tensor, or without one with the checksums in `frozen` alone.

    `frozen` and `trained` are the manifest's; an empty checksum leaves only the base to compare with.
    """
    masks = masks or {}
    found = Verification(against if base is not None else "the manifest's checksums")
    for name in tqdm(frozen, desc="verifying what is frozen", unit="tensor", leave=False):
        if why := _why_broken(name, frozen[name], out, base, masks.get(name)):
            found.broken[name] = why
        else:
            found.identical.append(name)
            found.parts += [name] if name in masks else []
    for name in tqdm(trained, desc="verifying what trained", unit="tensor", leave=False):
        if name not in out:
            found.lost.append(name)
            continue
        tensor = out[name]
        if tensor.is_floating_point() and not tensor.isfinite().all():
            found.not_finite.append(name)
        if base is not None and name not in base:
            found.new.append(name)
        elif base is not None:
            (found.unchanged if _same(tensor, base[name]) else found.changed).append(name)
    return found


def _why_broken(name: str, digest: str, out: Tensors, base: Tensors | None, mask: Mask | None) -> str | None:
    if name not in out:
        return "missing from the checkpoint"
    tensor = frozen_values(out[name], mask)
    if base is None:
        return None if checksum(tensor) == digest else "its checksum is not the manifest's"
    if name not in base:
        return "missing from the base"
    expected = frozen_values(base[name], mask)
    if digest and checksum(expected) != digest:
        return "the base's tensor is not the one that the manifest was written for"
    if mask is not None:  # a checkpoint holds fp32 masters, whose frozen elements are the base's, exactly
        expected = expected.to(torch.promote_types(expected.dtype, tensor.dtype))
    if _same(tensor, expected):
        return None
    if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
        return f"{tensor.dtype} {tuple(tensor.shape)}, in the base {expected.dtype} {tuple(expected.shape)}"
    count = int((as_bytes(tensor) != as_bytes(expected)).sum())
    largest = (tensor.double() - expected.double()).abs().max()
    return f"{count} of {as_bytes(tensor).numel()} bytes differ, by at most {largest:.3g}"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def verify_folder(out: str | Path, base: str | None = None) -> Verification:
    """Compare an output folder's frozen half with its base, or with the manifest's checksums if the base is gone.

    The other half of a Half-Reset is compared with the tuned model, if that is found. A base that is given must exist.
    """
    out, manifest = Path(out), Manifest.load(out)
    frozen, listed = manifest.frozen_checksums, _listed(manifest)
    try:
        folder = local_folder(base) if base else local_folder(manifest.base, manifest.revision)
        base_weights, against = weights_of(folder, frozen if manifest.is_adapter else listed), _short_path(folder)
    except HFTError:
        if base:
            raise
        if manifest.is_adapter or manifest.only_trained:
            raise HFTError(f"{manifest.base}, the base of {out}, was not found; name it with --base") from None
        base_weights, against = None, ""
    if manifest.is_adapter:
        return verify_adapter(out, manifest, base_weights)
    masks = masks_of(out, manifest)
    weights = OnBase(out, manifest, base_weights) if manifest.only_trained else weights_of(out, listed)
    changing = () if manifest.tuned else manifest.trained_parameters
    found = verify_tensors(weights, frozen, changing, base_weights, masks=masks, against=against)
    found.broken |= dict.fromkeys(manifest.moved, "changed in memory while the others trained")
    found.identical = [name for name in found.identical if name not in found.broken]
    note_unlisted(found, out, manifest, weights, base_weights or {})
    if manifest.tuned:
        note_strayed(found, manifest, weights, {name: ~mask for name, mask in masks.items()})
    return found


class OnBase(Mapping):
    """The whole tensors of a folder that holds only what trained; what is frozen is the base's."""

    def __init__(self, folder: Path, manifest: Manifest, base: Tensors) -> None:
        self.saved, self.base, self.masks = Weights(folder), base, masks_of(folder, manifest)
        frozen = manifest.frozen_checksums.keys()
        self.names = (self.saved.keys() | (frozen - self.masks.keys())) - (frozen - base.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.saved[name] if name in self.saved else self.base[name]
        if name not in self.masks or tensor.shape == self.base[name].shape:
            return tensor
        try:
            return self.base[name].to(tensor.dtype).masked_scatter(~self.masks[name].tensor(), tensor)
        except RuntimeError as error:
            raise HFTError(f"{name} has a different shape in this base; give the run's own base with --base") from error

    def __contains__(self, name: object) -> bool:
        return name in self.names  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def verify_adapter(out: Path, manifest: Manifest, base: Tensors) -> Verification:
    """Compare an adapter's base, which is not in the folder, with the checksums it was trained with."""
    found = verify_tensors(base, manifest.frozen_checksums, (), None)
    moved, trained = set(manifest.moved), set(manifest.trained_parameters)
    found.changed, found.unchanged = sorted(moved & trained), sorted(trained - moved)
    found.broken |= dict.fromkeys(sorted(moved - trained), "changed in memory while the adapter was trained")
    found.lost = [] if (out / ADAPTER_NAME).exists() else [ADAPTER_NAME]
    return found


def note_strayed(found: Verification, manifest: Manifest, weights: Tensors, masks: Mapping[str, Mask]) -> None:
    """Compare what a Half-Reset kept with the tuned model, if that is found."""
    try:
        folder = local_folder(manifest.tuned)
        tuned = weights_of(folder, manifest.trained_parameters)
    except HFTError:
        found.tuned = f"not compared, {manifest.tuned} was not found"
        return
    stayed = dict.fromkeys(manifest.trained_parameters, "")
    kept = verify_tensors(weights, stayed, (), tuned, masks=masks, against=_short_path(folder))
    found.tuned, found.strayed = kept._identical(), kept.broken


def note_unlisted(found: Verification, out: Path, manifest: Manifest, weights: Tensors, base: Tensors) -> None:
    """Add parameters, no buffers, that the manifest does not list: unlisted, or lost if only the base has them."""
    if not (unknown := (weights.keys() | base.keys()) - set(_listed(manifest))):
        return
    from hft.model.load import read_config

    parameters = {name for name, _ in meta_model(read_config(str(out), out)).named_parameters()}
    for name in sorted(unknown & parameters):
        (found.unlisted if name in weights else found.lost).append(name)


def check_base(base: str) -> None:
    """Refuse a base that differs from its own manifest, if it has one: its rounds would be unknown."""
    if not (Path(base) / MANIFEST_NAME).exists():
        return
    manifest = Manifest.load(base)
    weights, masks = weights_of(base, _listed(manifest)), masks_of(Path(base), manifest)
    found = verify_tensors(weights, manifest.frozen_checksums, manifest.trained_parameters, None, masks=masks)
    if not found.ok:
        wrong = [*found.broken, *found.lost][0]
        remedy = "put back the model that the manifest was written for, or remove the manifest to start a new sequence"
        raise HFTError(f"{base} does not match its {MANIFEST_NAME}: {wrong} differs; {remedy}")


def masks_of(folder: Path, manifest: Manifest) -> Mapping[str, Mask]:
    """The masks of a folder's partly frozen tensors, which must be those that its manifest was written with."""
    masks = Masks(folder) if manifest.masks else {}
    for name, digest in manifest.masks.items():
        if name not in masks or masks[name].digest() != digest:
            raise HFTError(f"{folder / MASKS_NAME} is not the one that the manifest was written with: {name} differs")
    return masks


def _listed(manifest: Manifest) -> list[str]:
    return list(dict.fromkeys([*manifest.frozen_checksums, *manifest.trained_parameters]))


def _short_path(folder: Path) -> str:
    return min(str(folder), os.path.relpath(folder), key=len)
