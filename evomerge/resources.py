"""Files that come with the package: ready-made search spaces and task suites, found by name.

Imports: `errors`; never torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from evomerge.errors import ConfigError


def resource_folder(kind: str) -> Path:
    """The folder of shipped files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


def find_resource(kind: str, name: str, folder: Path, where: str) -> Path:
    """The YAML file that `name` means: a path (from `folder`), or the name of a shipped file.

    Args:
        kind: `search_spaces` or `fitness`.
        name: a path ending in .yaml or .yml, or the stem of a shipped file.
        folder: where relative paths begin.
        where: begins the message.

    Raises:
        ConfigError: neither such a file nor such a name.
    """
    if name.endswith((".yaml", ".yml")):
        path = (folder / Path(name).expanduser()).resolve()
        if path.is_file():
            return path
        raise ConfigError(f"{where}: file `{path}` does not exist; correct the path")
    shipped = {path.stem: path for path in sorted(resource_folder(kind).glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"shipped are: {', '.join(shipped)}"
    raise ConfigError(f"{where}: `{name}` is neither a .yaml file nor shipped with evomerge; {hint}")
