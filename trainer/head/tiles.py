"""The only work of size [B, C]: this rank's part of the softmax denominator, without the targets, tile by tile.

Legend: B samples of all ranks, C classes of this rank (or those sampled in this step), K centres a class, T classes of
a tile, D dimension. Tiles are kept transposed, [T, B], so that each is one contiguous piece of memory.

    S_i = sum over j != y_i of exp(z_ij - shift),   z_ij = e_i . w_j (+ bias_j)

    forward   a tile:  z = W E^T                  (product 1)
                       P = exp(z - shift), 0 at the targets; S += sum of P over the tile
    backward  a tile:  dE += P^T W                (product 2), scaled per sample at the end
                       dW  = P (r E)              (product 3), r the gradient of S per sample

*store* keeps P from the forward to the backward: three products, and no pass over [B, C] in the backward.
*recompute* keeps nothing of that size, and makes P again in the backward: four products.

The shift. exp must neither overflow nor lose all of a row. Where the logits are bounded tightly enough one constant
does (`fixed_shift`), and S of all ranks can simply be added. Elsewhere each tile takes its own row maximum, the result
is log S, and the ranks' results are joined by logsumexp. P is never rescaled: the tiles' differences go into r.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.head.matmul import Products, Workspace, tensor_cores
from trainer.head.rows import GradientSink, Own, Rows, own_centres, rows_of
from trainer.head.skipping import Errors, Kept, bounds_of_lengths, essential, norm_of_own_rows
from trainer.head.softening import Hardening, Softening, Tile, TorchSoftening, TritonSoftening

EMPTY = -1e30  # log S of a rank that has no class but the target's; finite, so that no difference of two is nan


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How `negatives` computes; the same for forward and backward.

    Attributes:
        classes, centres, tile: C that take part, K and T.
        store: keep P for the backward.
        dtype: of the products' operands and of P; row sums and products' results are fp32 (fp64 where x is).
        shift: the constant shift, or None for row maxima.
        normalise: divide each row of W by its length.
        hardening: what a margin does to the logits of hard negatives.
        kernels: compute P by the Triton kernels.
        tf32: let a GPU round the operands of fp32 products.
        skip: relative error of the gradients that the backward may make by leaving out samples, where P is stored.
        unit_rows: each row of W has length 1.
    """

    classes: int
    centres: int
    tile: int
    store: bool
    dtype: torch.dtype
    shift: float | None
    normalise: bool = False
    hardening: Hardening | None = None
    kernels: bool = False
    tf32: bool = False
    skip: float = 0.0
    unit_rows: bool = False

    def tiles(self) -> list[tuple[int, int]]:
        return [(start, min(start + self.tile, self.classes)) for start in range(0, self.classes, self.tile)]


def fixed_shift(least: float, greatest: float, classes: int, dtype: torch.dtype) -> float | None:
    """A constant K with which exp(z - K) is safe for all logits z in [least, greatest]; None where there is none.

    With h and l the logarithms of the greatest and the least normal number (fp32: 88.7 and -87.3):
      no overflow of S     greatest - K + ln C          <= h
      no underflow of P    least - K                    >= l, also of a row whose logits are all `least`
      no overflow of r e   -(least - K) + ln(length)    <= h, r = gradient / S with a gradient up to 16, length = |e|
    What is left out: with bf16 products r e may fall below the normal numbers when all centres lie in one direction and
    s > 75, where the gradient of the other classes' rows is then lost; with fp32 it keeps its digits.
    For least = -s this is 2 s + ln C <= 176 up to the safety of half a nat. 0 is preferred: it needs no subtraction.
    """
    limits = torch.finfo(dtype)
    highest, lowest = math.log(limits.max), math.log(limits.tiny)
    length = max(abs(least), abs(greatest), 1.0)
    from_above = greatest + math.log(classes) - highest + 0.25
    from_below = least - max(lowest, math.log(16 * length / max(classes - 1, 1)) - highest) - 0.25
    if from_above > from_below:
        return None
    return min(max(0.0, from_above), from_below)


class _Negatives(torch.autograd.Function):
    """See `negatives`. The weight and the bias are inputs so that the graph knows of them; their gradients go to the
    sink, tile by tile, since a copy of [C, D] by autograd would cost more than some of the products."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, e_BD: Tensor, weight_RD: Tensor, bias_C: Tensor | None, tiles: "Tiles", keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.tiles = tiles  # type: ignore[attr-defined]
        ctx.save_for_backward(weight_RD)  # notices a weight changed before the backward
        with tensor_cores(tiles.plan.tf32):
            result_B = tiles.forward(keep and any(ctx.needs_input_grad[:3]))  # type: ignore[attr-defined]
        return result_B, *own_centres(tiles.rows, tiles.own, tiles.wide)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # type: ignore[attr-defined]  # noqa: B018
        tiles: Tiles | None = ctx.tiles  # type: ignore[attr-defined]
        if tiles is None:
            raise RuntimeError("a second backward through a loss of the head: its P is gone, compute the loss again")
        if tiles.kept_RB is not None:
            ctx.tiles = None  # type: ignore[attr-defined]
        with tensor_cores(tiles.plan.tf32):
            return *tiles.backward(*gradients), None, None


class Tiles:
    """One step's tiles, from the forward to the backward; see `negatives`.

    Attributes:
        kept_RB: P times dz/d(e.w) of all tiles, where it is stored for the backward.
        narrow_RD: beside it the rows in the operands' type, where a GPU has to make a copy of them.
        shifts: each tile's row maxima, where there is no fixed shift.
        result_B: S, or log S.
    """

    def __init__(
        self, e_BD: Tensor, rows: Rows, own: Own, plan: TilePlan, *, sink: GradientSink, memory: Workspace
    ) -> None:
        self.e_BD, self.rows, self.own, self.plan, self.sink, self.memory = e_BD, rows, own, plan, sink, memory
        self.products = Products(e_BD, plan.dtype, memory)
        self.wide = e_BD.dtype
        kind = TritonSoftening if plan.kernels and self.wide == torch.float32 else TorchSoftening
        self.soften: Softening = kind(self.products, rows, own, shift=plan.shift, hardening=plan.hardening)
        self.kept_RB: Tensor | None = None
        self.narrow_RD: Tensor | None = None
        self.shifts: list[Tensor] = []

    def forward(self, keep: bool) -> Tensor:
        """S_B or log S_B of all tiles."""
        plan, K = self.plan, self.plan.centres
        if keep:
            self.kept_RB = self.memory.take("P", (plan.classes * K, len(self.e_BD)), plan.dtype, self.e_BD.device)
            if self.products.mixed and not plan.normalise and self.rows.weight_RD.dtype != plan.dtype:
                shape = plan.classes * K, self.e_BD.shape[1]
                self.narrow_RD = self.memory.take("W", shape, plan.dtype, self.e_BD.device)
        sums: list[Tensor] = []
        for start, stop in plan.tiles():
            out = None if self.kept_RB is None else self.kept_RB[start * K : stop * K]
            if self.narrow_RD is not None:
                self.narrow_RD[start * K : stop * K] = self.rows.tile(start, stop)
            sum_B, maxima_B = self.soften(self._tile(start, stop), None, out)
            sums.append(sum_B)
            if maxima_B is not None:
                self.shifts.append(maxima_B)
        result_B = self._join(sums)
        self.result_B = result_B.clone()  # the output itself would be a cycle that keeps P alive
        return result_B

    def _tile(self, start: int, stop: int) -> Tile:
        if self.narrow_RD is not None:
            return Tile(start, stop, self.narrow_RD[start * self.plan.centres : stop * self.plan.centres], None)
        w_RD, inverse_R1 = self.rows.tile(start, stop), None
        if self.plan.normalise:
            lengths_R1: Tensor = torch.linalg.vector_norm(w_RD.to(self.wide), dim=1, keepdim=True)
            inverse_R1 = lengths_R1.clamp_min(1e-12).reciprocal()
        return Tile(start, stop, w_RD, inverse_R1)

    def _join(self, sums: list[Tensor]) -> Tensor:
        """S_B of all tiles with a fixed shift, else log S_B. Tiles are added in fp64: there may be thousands."""
        if not sums:
            return self.e_BD.new_full((self.e_BD.shape[0],), 0.0 if self.plan.shift is not None else EMPTY)
        stacked = torch.stack(sums).double()
        if self.plan.shift is not None:
            return stacked.sum(dim=0).to(self.wide)
        return torch.logsumexp(stacked.log() + torch.stack(self.shifts).double(), dim=0).clamp_min(EMPTY).to(self.wide)

    def backward(self, dresult_B: Tensor, dcentres_BKD: Tensor, down_B: Tensor) -> tuple[Tensor, None, Tensor | None]:
        """Products 2 and 3 of every tile; returns the gradients of E, W (that of W is the sink's) and the bias."""
        plan, K, sink = self.plan, self.plan.centres, self.sink
        empty_B = self.result_B <= EMPTY
        self.finite_B, self.dresult_B = torch.where(empty_B, 0, self.result_B), torch.where(empty_B, 0, dresult_B)
        kept = self._kept(dcentres_BKD)
        add = sink.begin(self.rows)
        de_BD = torch.zeros_like(self.e_BD) if kept is None else kept.de_BD
        dbias: list[Tensor] = []
        re_BD = (self.e_BD * self.dresult_B[:, None]).to(plan.dtype)
        for number, (start, stop) in enumerate(plan.tiles()):
            tile, r_B = self._tile(start, stop), self._rates(number)
            q_RB = self._factors(tile)
            if self.rows.bias_C is not None:
                dbias.append(torch.mv(q_RB.to(self.wide), r_B))
            if r_B is not self.dresult_B:
                re_BD = (self.e_BD * r_B[:, None]).to(plan.dtype)
            if kept is None:
                self._add_embeddings(de_BD, q_RB, tile, r_B)
            else:
                q_RB = self._columns(q_RB, kept.samples_n)
            gradient = sink.tile(start * K, stop * K)
            self._row_gradient(gradient, q_RB, re_BD if kept is None else re_BD[kept.samples_n], add, tile)
            if not sink.keeps:
                self._add_own(gradient, dcentres_BKD, start, stop)
            sink.finished(self.rows.places(start, stop), gradient)
        if sink.keeps and plan.classes:
            self._add_own(sink.tile(0, plan.classes * K), dcentres_BKD, 0, plan.classes)
        sink.end(self.rows)
        if self.kept_RB is not None:
            self.memory.give_back("P", self.kept_RB)
        if self.narrow_RD is not None:
            self.memory.give_back("W", self.narrow_RD)
        if kept is None and plan.shift is not None:
            de_BD.mul_(self.dresult_B[:, None])
        return de_BD, None, self._bias_gradient(dbias, down_B)

    def _factors(self, tile: Tile) -> Tensor:
        """Q of the tile, saved or made again."""
        if self.kept_RB is not None:
            return self.kept_RB[tile.start * self.plan.centres : tile.stop * self.plan.centres]
        q_RB = self.memory.scratch("q", (len(tile.w_RD), len(self.e_BD)), self.plan.dtype, self.e_BD.device)
        self.soften(tile, None if self.plan.shift is not None else self.finite_B, q_RB)
        return q_RB

    def _rates(self, number: int) -> Tensor:
        """r of tile `number`: the gradient of each sample's S by the tile's own shift."""
        if self.plan.shift is not None or self.kept_RB is None:
            return self.dresult_B
        return self.dresult_B * (self.shifts[number] - self.finite_B).exp()

    def _kept(self, dcentres_BKD: Tensor) -> Kept | None:
        """The samples that matter, and the gradient of E; None: all of them, and it is yet to be computed."""
        plan = self.plan
        if not plan.skip or self.kept_RB is None or not plan.classes:
            return None
        mass_B = self.dresult_B.abs() * (self.result_B if plan.shift is not None else 1)
        lengths = (1.0, 1.0) if plan.unit_rows else bounds_of_lengths(self.rows.weight_RD, plan.normalise)
        errors = Errors.of(mass_B, self.e_BD, lengths, plan.hardening)
        own_BKD = torch.where(self.own.mask_B[:, None, None], dcentres_BKD, 0)
        least = norm_of_own_rows(self._pushed_BKD(), own_BKD, self.own.place_B, self.own.mask_B)
        return essential(errors, least, plan.skip, self._embeddings_of)

    def _pushed_BKD(self) -> Tensor:
        """The denominator's part of dW at the rows of each sample's class; of unit rows without the part along them."""
        assert self.kept_RB is not None
        K, place_B = self.plan.centres, self.own.place_B
        number_B = place_B // self.plan.tile
        r_BB = torch.stack([self._rates(n) for n in range(len(self.plan.tiles()))])[number_B]
        q_RB = self.kept_RB.index_select(0, rows_of(place_B, K)).to(self.wide)
        pushed_BKD = ((q_RB * r_BB.repeat_interleave(K, 0)) @ self.e_BD).view(len(place_B), K, -1)
        if not self.plan.normalise and not self.plan.unit_rows:
            return pushed_BKD
        unit_BKD = torch.nn.functional.normalize(own_centres(self.rows, self.own, self.wide)[0], dim=2)
        return pushed_BKD - unit_BKD * (pushed_BKD * unit_BKD).sum(dim=2, keepdim=True)

    def _embeddings_of(self, samples_n: Tensor) -> Tensor:
        """Product 2 of all tiles for these samples alone."""
        de_nD = self.e_BD.new_zeros(len(samples_n), self.e_BD.shape[1])
        for number, (start, stop) in enumerate(self.plan.tiles()):
            tile = self._tile(start, stop)
            self._add_embeddings(
                de_nD, self._columns(self._factors(tile), samples_n), tile, self._rates(number)[samples_n]
            )
        return de_nD.mul_(self.dresult_B[samples_n, None]) if self.plan.shift is not None else de_nD

    def _add_embeddings(self, total_BD: Tensor, q_RB: Tensor, tile: Tile, r_B: Tensor) -> None:
        """Product 2; with a fixed shift the factor r is left to the end."""
        w_RD = self.products.operand(tile.w_RD, "w")
        self.products.add_embeddings(total_BD, q_RB, w_RD, None if self.plan.shift is not None else r_B)

    def _columns(self, q_RB: Tensor, samples_n: Tensor) -> Tensor:
        """Q of these samples, valid until the next call."""
        out = self.memory.scratch("columns", (len(q_RB), len(samples_n)), q_RB.dtype, q_RB.device)
        return torch.index_select(q_RB, 1, samples_n, out=out)

    def _row_gradient(self, out: Tensor, q_RB: Tensor, re_BD: Tensor, add: bool, tile: Tile) -> None:
        """Product 3 into `out`; for rows that are divided by their length, times the Jacobian (I - u u^T) / |w|."""
        if tile.inverse_R1 is None:
            self.products.rows(q_RB, re_BD, out, add)
            return
        gradient = torch.empty_like(tile.w_RD, dtype=self.wide)
        self.products.rows(q_RB, re_BD, gradient, False)
        unit_RD = tile.w_RD.to(self.wide) * tile.inverse_R1
        gradient.sub_(unit_RD * (gradient * unit_RD).sum(dim=1, keepdim=True))
        if add:
            out.add_(gradient)
        else:
            out.copy_(gradient)

    def _add_own(self, gradient: Tensor, dcentres_BKD: Tensor, start: int, stop: int) -> None:
        """The target logits' own, sparse part: dW[y_i] += d t_i / d w. It is 0 where the sample is not this rank's."""
        inside_B, row_B = self.own.within(start, stop)
        added_BKD = dcentres_BKD * inside_B[:, None, None]
        gradient.index_add_(0, rows_of(row_B, self.plan.centres), added_BKD.flatten(0, 1).to(gradient.dtype))

    def _bias_gradient(self, parts: list[Tensor], down_B: Tensor) -> Tensor | None:
        """[C] of this rank, from the tiles' parts and the targets' own; sparse where not all classes took part."""
        if self.rows.bias_C is None:
            return None
        dbias = torch.cat(parts) if parts else self.e_BD.new_zeros(0)
        if self.plan.classes:
            dbias = dbias.index_add(0, self.own.place_B, torch.where(self.own.mask_B, down_B, 0))
        if self.rows.chosen is None:
            return dbias
        shape = self.rows.bias_C.shape
        chosen, coalesced = self.rows.chosen.clamp(min=0)[None], not self.rows.padded
        return torch.sparse_coo_tensor(chosen, dbias, shape, is_coalesced=coalesced, check_invariants=False)


def negatives(
    e_BD: Tensor, rows: Rows, own: Own, plan: TilePlan, *, sink: GradientSink, memory: Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's part of the denominator, and the centres of each sample's own class.

    Replaces `logits = e @ W.T; logits[own] = -inf; (logits - shift).exp().sum(1)` and `W[labels]`.

    Returns:
        S_B, the sum over this rank's classes of exp(z - shift) without the targets; log S_B where `plan.shift` is None.
        centres_BKD, the K centres of each sample's class; rows of some other class where it is not this rank's.
        bias_B of each sample's class; 0 without bias.
    """
    tiles = Tiles(e_BD.detach(), rows, own, plan, sink=sink, memory=memory)
    keep = plan.store and torch.is_grad_enabled()  # which the function itself cannot see
    result: tuple[Tensor, Tensor, Tensor] = _Negatives.apply(  # type: ignore[no-untyped-call]
        e_BD, rows.weight_RD, rows.bias_C, tiles, keep
    )
    return result
