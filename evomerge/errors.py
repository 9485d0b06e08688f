"""Every exception evomerge raises on purpose, as one tree.

    EvomergeError
    ├── ConfigError        a YAML file, a key or a command-line value is wrong
    │   └── RunDirError    the run directory cannot be used (exists, locked, unwritable, changed)
    ├── SourceError        a model, adapter or tokenizer cannot be read
    │   └── CompatibilityError   it can be read, but does not fit the base model
    ├── RecipeError        a recipe asks for something its method does not allow
    ├── FitnessError       a task, its items or its scorer are wrong
    │   └── HeldOutError   held-out items were read while a search was running
    ├── EngineError        the machine failed: out of memory, a dead process, weights that were not merged
    ├── StorageError       the study's storage cannot be read or written
    └── ExportError        a recipe cannot be written in the form asked for

The command line prints the message of any of these on one line and exits with code 2. During a search a
`RecipeError` makes the trial INFEASIBLE and an `EngineError` makes it FAILED; every other kind ends the run.

Imports: nothing.
"""

from __future__ import annotations


class EvomergeError(Exception):
    """Base of all errors that a user can act on: where, what was found, what to change."""


class ConfigError(EvomergeError):
    """A configuration file or a command-line value is wrong."""


class RunDirError(ConfigError):
    """The run directory cannot be used as asked."""


class SourceError(EvomergeError):
    """A source model, adapter or tokenizer cannot be read."""


class CompatibilityError(SourceError):
    """A source can be read but does not fit the base model."""


class RecipeError(EvomergeError):
    """A recipe asks for something that its method does not allow; a trial with it is INFEASIBLE."""


class FitnessError(EvomergeError):
    """A task, its items or its scorer are wrong."""


class HeldOutError(FitnessError):
    """Held-out items were read while they are sealed."""


class EngineError(EvomergeError):
    """The engine failed for a reason that lies in the machine, not in the recipe; a trial is FAILED."""


class StorageError(EvomergeError):
    """The study's storage cannot be read or written."""


class ExportError(EvomergeError):
    """A recipe cannot be written in the form asked for."""
