"""What a kind of stage is."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A kind of stage.

    Attributes:
        settings: the class of its settings.
        check: (settings, model config, settings of the stages before) -> None, raises if they don't go together.
        check_data: (settings, carried) -> None, raises if the text does not suffice.
        check_layout: (settings, model config, layout) -> None, raises if the work can't be spread over the devices.
        run: (settings, carried, name) -> summary, JSON-able, with its seconds; leaves the stage's results on disk.
        load: (settings, carried, name, summary) -> None, hands the results on, whether the stage has just run or did
            so before. Raises LookupError if they are not there any more.
        inputs: (settings, settings of the stages before) -> names of the stages whose results it takes.
        splits: settings -> which splits it reads of the text that `settings.data` names.
        programs: (settings, model config, layout) -> what it runs again and again, see `stages/programs.py`.
        resumes: whether it goes on from what it has left behind when it was stopped, rather than begin again.
    """

    settings: type
    check: Callable
    check_data: Callable
    check_layout: Callable
    run: Callable
    load: Callable
    inputs: Callable
    splits: Callable = lambda settings: ()
    programs: Callable = lambda settings, config, layout: ()
    resumes: bool = True


def nothing(*_) -> None:
    """The check of a stage that has nothing to check."""
