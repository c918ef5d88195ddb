"""The tape's own rules, on graphs small enough to count on paper."""

from __future__ import annotations

import pytest

from planner.memory.tape import Tape, Tensor, booked, rounded

K = 1024
M = 1024 * K


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (1, 512), (512, 512), (513, 1024), (4000, 4096)])
def test_requests_are_rounded_to_512_bytes(asked: int, given: int) -> None:
    assert rounded(asked) == given


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (9 * M + 3, 9 * M + 512),  # under 10 MiB: only rounded
        (11 * M, 12 * M),  # a 12 MiB segment, whose last 1 MiB is not split off
        (11 * M - 512, 11 * M - 512),  # 1 MiB and 512 B would be left: split
        (12 * M, 12 * M),
        (int(26.25 * M), int(26.25 * M)),  # 28 MiB segment, 1.75 MiB left over
    ],
)
def test_lasting_tensors_keep_the_rest_of_a_segment(asked: int, given: int) -> None:
    assert booked(asked) == given


def test_peak_is_the_most_alive_at_once() -> None:
    tape = Tape()
    a = tape.new(2 * K)
    b = tape.new(3 * K)
    tape.free(a)
    c = tape.new(1 * K)
    assert (tape.live, tape.peak) == (4 * K, 5 * K)
    tape.free(b, c)
    assert tape.live == 0


def test_mark_forgets_the_peak_and_touch_raises_it_for_a_moment() -> None:
    tape = Tape()
    a = tape.new(4 * K)
    tape.free(a)
    tape.mark()
    assert tape.peak == 0
    tape.touch(7 * K)
    assert (tape.live, tape.peak) == (0, 7 * K)


def test_a_storage_lives_as_long_as_anything_holds_it() -> None:
    tape = Tape()
    a = tape.new(K)
    again = tape.hold(a)
    tape.free(a)
    assert tape.live == K
    tape.free(again)
    assert tape.live == 0


def test_a_view_books_nothing_and_keeps_its_base() -> None:
    tape = Tape()
    base = tape.new(4 * K)
    half = tape.view(base, 2 * K)
    tape.free(base)
    assert (half.bytes, tape.live) == (2 * K, 4 * K)
    tape.free(half)
    assert tape.live == 0


def test_temporaries_stand_beside_the_output() -> None:
    tape = Tape()
    x = tape.new(K, needs_grad=True)
    tape.op((x,), 2 * K, temp=5 * K)
    assert (tape.live, tape.peak) == (3 * K, 8 * K)


def test_saved_tensors_live_until_their_backward_has_run() -> None:
    tape = Tape()
    x = Tensor(K, needs_grad=True)
    middle = tape.op((x,), 2 * K)
    out = tape.op((middle,), 512, save=(middle,))
    tape.free(middle)
    assert tape.live == 2 * K + 512
    out.grad = tape.new(512)
    tape.free(out)
    tape.mark()
    tape.backward(out)
    # middle (2 K, saved), out's gradient (512) and middle's gradient (2 K) meet
    assert tape.peak == 2 * K + 512 + 2 * K
    assert x.grad is not None and tape.live == K


def test_without_recording_nothing_is_saved() -> None:
    tape = Tape(recording=False)
    x = Tensor(K, needs_grad=True)
    middle = tape.op((x,), 2 * K)
    out = tape.op((middle,), 512, save=(middle,))
    tape.free(middle)
    assert (tape.live, tape.saving_ops) == (512, 0)
    assert out.needs_grad


def test_no_gradient_no_saving() -> None:
    tape = Tape()
    x = tape.new(K)
    out = tape.op((x,), K, save=(x,))
    tape.free(x)
    assert tape.live == K and not out.needs_grad


def run_sum(shared: bool) -> Tape:
    """x reaches the output on two paths; `shared`: the first gradient is also held by another tensor."""
    tape = Tape()
    x = Tensor(K, needs_grad=True)
    left = tape.op((x,), K)
    out = tape.add(left, x) if shared else tape.add(left, tape.op((x,), K))
    out.grad = tape.new(K)
    tape.live = K  # the gradient alone; what the forward pass left does not matter here
    tape.mark()
    tape.backward(out)
    return tape


def test_gradients_meet_in_place_where_nobody_else_holds_the_first() -> None:
    # grad(out) passes to both paths (1 K); each path makes a gradient of x (1 K each); the second is added
    # into the first: 3 K at most, x's gradient stays
    tape = run_sum(shared=False)
    assert (tape.peak, tape.live) == (3 * K, K)


def test_gradients_meet_out_of_place_where_the_first_is_shared() -> None:
    # x receives grad(out) itself, which `left` holds too while its backward runs: adding the gradient that
    # comes back through `left` (1 K) needs a third tensor only if the first is still held; it is not
    tape = run_sum(shared=True)
    assert (tape.peak, tape.live) == (2 * K, K)


def test_a_gradient_held_by_two_tensors_is_not_written_to() -> None:
    tape = Tape()
    x, y = Tensor(K, needs_grad=True), Tensor(K, needs_grad=True)
    out = tape.add(x, y)
    out.grad = tape.new(K)
    tape.live = K
    tape.backward(out)
    assert x.grad is y.grad and tape.live == K
    tape._accumulate(x, tape.new(K))  # 2 K alive, then a third K for the sum, then the newcomer goes
    assert x.grad is not y.grad and (tape.live, tape.peak) == (2 * K, 3 * K)


def test_backward_temporaries_and_gradient_sizes() -> None:
    tape = Tape()
    x = Tensor(K, needs_grad=True)
    out = tape.op((x,), K, back_temp=6 * K, grad_bytes=3 * K)
    out.grad = tape.new(K)
    tape.live = K
    tape.mark()
    tape.backward(out)
    assert (tape.peak, tape.live) == (K + 3 * K + 6 * K, 3 * K)


def test_a_weight_counts_its_gradient_only() -> None:
    tape = Tape()
    x = tape.new(K)
    w = tape.parameter(11 * M, trainable=True)
    out = tape.op((x, w), K, save=(x,))
    assert tape.live == 2 * K
    out.grad = tape.new(K)
    tape.free(out, x)
    tape.backward(out)
    assert tape.live == 12 * M  # booked with the rest of its segment
    frozen = tape.parameter(K, trainable=False)
    assert not frozen.needs_grad


def test_autocast_copies_are_made_once_and_dropped_on_leaving() -> None:
    tape = Tape()
    w = tape.parameter(2 * K, trainable=True)
    first = tape.cached("a", w, K)
    assert tape.cached("a", w, K) is first and tape.live == K
    tape.leave_autocast()
    assert tape.live == 0


def test_nodes_nothing_reached_free_what_they_saved() -> None:
    tape = Tape()
    x = Tensor(K, needs_grad=True)
    unused = tape.op((x,), K, save_out=True)
    out = tape.op((x,), K)
    tape.free(unused)
    out.grad = tape.new(K)
    tape.free(out)
    tape.backward(out)
    assert tape.live == K  # x's gradient


class TestRecomputation:
    """Checkpointing runs a layer again until the last tensor it saved is back."""

    @staticmethod
    def forward(tape: Tape, x: Tensor) -> Tensor:
        a = tape.op((x,), 2 * K)
        b = tape.op((a,), 4 * K, save=(a,))
        tape.free(a)
        c = tape.op((b,), 8 * K, save_weight=True)
        tape.free(b)
        d = tape.op((c,), 16 * K)
        tape.free(c)
        return d

    def test_saving_ops_are_counted_weights_included(self) -> None:
        tape = Tape()
        self.forward(tape, Tensor(K, needs_grad=True))
        assert tape.saving_ops == 2

    def test_it_stops_before_the_op_that_saves_last(self) -> None:
        tape = Tape(stop_after=2)
        out = self.forward(tape, Tensor(K, needs_grad=True))
        # a (2 K) and b (4 K) are made; the kernels of c and d never run
        assert tape.peak == 6 * K and tape.stopped
        tape.free(out)
        assert tape.live == 2 * K  # a, saved

    def test_an_output_that_is_saved_is_still_made(self) -> None:
        tape = Tape(stop_after=1)
        x = Tensor(K, needs_grad=True)
        tape.op((x,), 4 * K, save_out=True)
        tape.op((x,), 8 * K)
        assert tape.peak == 4 * K

    def test_gradients_made_before_it_starts_wait_for_it(self) -> None:
        tape = Tape(stop_after=2)
        grad = tape.new(16 * K)
        out = self.forward(tape, Tensor(K, needs_grad=True))
        tape.free(out)
        out.grad = grad
        # d saved nothing: its backward turns 16 K of gradient into 8 K before anything is asked for
        assert tape.backward(out) == 8 * K - 16 * K
