"""A text file as sequences of characters, each with the character that follows it."""

from fedjaxprune.data.datasets import Dataset
from fedjaxprune.data.sources import files, windows
from fedjaxprune.registry import Part
from fedjaxprune.settings import Probability, Settings, setting


class FileSettings(Settings):
    """Which text is read, and what of it is for tests."""

    path: str = setting(..., "File of text in UTF-8.")
    test_fraction: Probability = setting(
        0.2, "Share at the end of each speaker's text that is for tests.", unit="fraction", gt=0
    )


class TextSettings(windows.WindowSettings, FileSettings):
    """Which text is cut into examples, and how."""


def build(settings: TextSettings) -> Dataset:
    """Cut the text into examples of `length` characters, labeled with the next character.

    Lines such as ``ROMEO:`` name who speaks the lines that follow. A speaker's lines are joined,
    no example has two speakers, and ``speaker`` is the key of natural clients. Without such lines
    the key is ``line``, the number of the line in which an example starts. No character of a test
    example is in a training example. The symbols are the characters of the file, in the order of
    their code points, unless the settings say otherwise.

    References:
      Caldas et al., `LEAF <https://arxiv.org/abs/1812.01097>`_, 2018, which cuts the plays of
      Shakespeare in this way.
    """
    path = files.find(settings.path)
    text = files.read(path, lambda path: path.read_text(encoding="utf-8"), "text in UTF-8")
    train, test = {}, {}
    for speaker, said in windows.by_speaker(text).items():
        end = len(said) - round(settings.test_fraction * len(said))
        train[speaker], test[speaker] = said[:end], said[end:]
    return windows.cut(train, test, settings, name=path.stem)


PARTS = {
    "text": Part(
        build=build, settings=TextSettings, summary="a text file, to predict the next character"
    )
}
