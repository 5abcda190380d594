"""Saving and loading policies: their settings as JSON, their weights as safetensors, written whole or not at all."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from torch import Tensor

from attnzoo.cache.policies.known import Policy, policy_from
from attnzoo_kernels.errors import ConfigError

SETTINGS = "attnzoo_policy.json"
WEIGHTS = "attnzoo_policy.safetensors"
FORMAT = 1


def save(policy: Policy, folder: str | Path) -> Path:
    """Saves a policy; what :func:`load` reads is the same, to the bit.

    Args:
        policy: The policy.
        folder: Where to; it is made where it is not there. A policy that lies there already is replaced.

    Raises:
        ConfigError: If it is no policy.
        OSError: If the disk refuses. What lay there before is left then.
    """
    from safetensors.torch import save_file

    if not isinstance(policy, Policy):
        raise ConfigError(f"policy: expected one of attnzoo.policies, got {type(policy).__name__}")
    folder = Path(folder)
    weights = {name: x.detach().cpu().contiguous().clone() for name, x in policy.weights().items()}
    about = {"format": FORMAT, "settings": policy.settings(), "weights": sorted(weights)}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".policy-") as name:
        temporary = Path(name)
        if weights:
            save_file(weights, temporary / WEIGHTS)
        (temporary / SETTINGS).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # The settings last: where they are, all is.
        if weights:
            (temporary / WEIGHTS).replace(folder / WEIGHTS)
        (temporary / SETTINGS).replace(folder / SETTINGS)
    if not weights:
        (folder / WEIGHTS).unlink(missing_ok=True)
    return folder


def load(folder: str | Path) -> Policy:
    """Loads what :func:`save` has stored.

    Raises:
        ConfigError: If a file is missing or damaged, or says something that no policy is.
    """
    file = Path(folder) / SETTINGS
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected a policy that attnzoo has saved: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT or not isinstance(about.get("settings"), dict):
        raise ConfigError(f"{file}: expected format {FORMAT} with settings")
    return policy_from(about["settings"], _read_weights(Path(folder) / WEIGHTS, about.get("weights")))


def _read_weights(file: Path, names: object) -> dict[str, Tensor]:
    """The weights that a policy's settings name.

    Raises:
        ConfigError: If they are not there.
    """
    if not names:
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file}: damaged: {error}") from error
    if sorted(found) != names:
        raise ConfigError(f"{file}: expected {names}, got {sorted(found)}")
    return found
