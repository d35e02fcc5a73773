"""What a kernel says to the same kernel on another GPU, and how it waits for that: PTX, which Triton has no words for.

No wait goes on in silence: beyond `patience_ns` it writes 1 to `late`, memory that the host reads. And none goes on
once the host has written something to `abandoned`: what the kernel returns is of no use then.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["await_flag", "await_words", "bring_near", "put_words", "raise_flag"]


@triton.jit
def put_words(address, low, high, number, ok):
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred sends;
            .reg .b64 first, second;
            setp.ne.s32 sends, $5, 0;
            mov.b64 first, {$2, $4};
            mov.b64 second, {$3, $4};
            @sends st.relaxed.sys.global.v2.b64 [$1], {first, second};
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r,r,r,r",
        [address, low, high, number, ok],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def await_words(address, number, ok, late, abandoned, patience_ns):
    return tl.inline_asm_elementwise(
        """
        {
            .reg .pred skips, came, tries, over;
            .reg .b32 low, high, one, two, tried, few;
            .reg .b64 first, second, since, now;
            mov.u32 low, 0;
            mov.u32 high, 0;
            mov.u32 tried, 0;
            setp.eq.s32 skips, $4, 0;
            @skips bra words_done;
            mov.u64 since, %globaltimer;
        words_again:
            ld.relaxed.sys.global.v2.b64 {first, second}, [$2];
            mov.b64 {low, one}, first;
            mov.b64 {high, two}, second;
            setp.eq.s32 came, one, $3;
            setp.eq.and.s32 came, two, $3, came;
            @came bra words_done;
            add.u32 tried, tried, 1;
            and.b32 few, tried, 16383;
            setp.ne.u32 tries, few, 0;
            @tries bra words_again;
            mov.u64 now, %globaltimer;
            sub.u64 now, now, since;
            setp.gt.u64 over, now, $7;
            @over st.relaxed.sys.global.u32 [$5], 1;
            ld.relaxed.sys.global.u32 few, [$6];
            setp.ne.u32 over, few, 0;
            @!over bra words_again;
        words_done:
            mov.u32 $0, low;
            mov.u32 $1, high;
        }
        """,
        "=r,=r,l,r,r,l,l,l",
        [address, number, ok, late, abandoned, tl.cast(patience_ns, tl.int64)],
        dtype=(tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def bring_near(address):
    """Into the L2 cache, which megabytes of weights have run through since: what is read there later is up to date."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def raise_flag(address, number):
    """By one thread, once all of the block have written."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first st.release.sys.global.u32 [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [address, number],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def await_flag(address, number, late, abandoned, patience_ns):
    """Until the flag is `number` or beyond; by one thread, all others wait at the next barrier."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred others, came, tries, over;
            .reg .b32 thread, flag, tried, few;
            .reg .b64 since, now;
            mov.u32 tried, 0;
            mov.u32 thread, %tid.x;
            setp.ne.u32 others, thread, 0;
            @others bra flag_done;
            mov.u64 since, %globaltimer;
        flag_again:
            ld.acquire.sys.global.u32 flag, [$1];
            sub.s32 flag, flag, $2;
            setp.ge.s32 came, flag, 0;
            @came bra flag_done;
            add.u32 tried, tried, 1;
            and.b32 few, tried, 16383;
            setp.ne.u32 tries, few, 0;
            @tries bra flag_again;
            mov.u64 now, %globaltimer;
            sub.u64 now, now, since;
            setp.gt.u64 over, now, $5;
            @over st.relaxed.sys.global.u32 [$3], 1;
            ld.relaxed.sys.global.u32 few, [$4];
            setp.ne.u32 over, few, 0;
            @!over bra flag_again;
        flag_done:
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r,l,l,l",
        [address, number, late, abandoned, tl.cast(patience_ns, tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
