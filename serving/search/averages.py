"""A projection with one row a subject: the template that its samples make."""

from collections.abc import Iterator, Sequence

from serving.search.blocks import Vectors, of_subjects
from serving.search.index import Index
from serving.search.projection import Projection
from serving.search.templates import joined, templates, whole_subjects
from serving.storage.changes import Enrolment, State
from serving.storage.reading import Piece
from serving.storage.rows import NOBODY


class Averages(Projection):
    """As `Projection`. Every change of a subject makes its template anew, of what the store has of it then."""

    _held = 0

    @property
    def samples(self) -> int:
        return self._held

    def add(self, done: Sequence[tuple[Enrolment, Vectors]]) -> None:
        self._renew(*dict.fromkeys(one.subject_id for one, _ in done))
        self.revision += 1

    def remove(self, subject_id: str) -> None:
        super().remove(subject_id)
        self._count()

    def remove_sample(self, subject_id: str, sample_id: str) -> None:
        self._renew(subject_id)
        self.revision += 1

    def merge(self, into: str, other: str) -> None:
        self._renew(into)
        self.remove(other)

    def _renew(self, *subject_ids: str) -> None:
        """Make these templates anew. The old ones are off the disk when this returns."""
        before = self.index.numbers(subject_ids)
        pieces = [piece for subject_id in subject_ids if (piece := self._store.samples_of(subject_id))]
        if pieces:
            made = templates(joined(pieces), self._template)
            self.index.replace(made.subject_ids, made.sample_ids, made.vectors_BD, made.numbers_B - NOBODY)
        if len(before):
            self._keeper.erase(of_subjects(before))
        self._count()

    def _count(self) -> None:
        self._held = self._store.state().samples

    def _rows(self, state: State) -> tuple[int, int]:
        return state.subjects, state.subjects

    def _pieces(self, settled: bool) -> Iterator[Piece]:
        return whole_subjects(self._store.samples(settled, by_subject=True))

    def _put(self, index: Index, piece: Piece) -> None:
        """The piece holds all samples of its subjects."""
        super()._put(index, templates(piece, self._template))

    def _install(self, index: Index) -> None:
        super()._install(index)
        self._count()
