"""A gallery of vectors in 32 dimensions, opened and loaded."""

from serving.gallery import Gallery
from serving.store import Store
from serving.threshold import Rule

MODEL = "a" * 32


def open_gallery(path):
    opened = Gallery(Store(path, MODEL, 32), Rule(0.5, "a test"), Rule(0.6, "a test"))
    opened.load()
    return opened
