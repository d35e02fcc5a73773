"""Lines at random that a stranger may send: noise, deep or endless JSON, and what looks like ours."""

from hypothesis import strategies as st

LINES = st.one_of(
    st.binary(max_size=400),
    st.text(max_size=100).map(str.encode),
    st.builds(
        lambda head, n: head * n, st.sampled_from([b"[", b"{", b'{"a":', b"\n", b"\0", b"9"]), st.integers(1, 70_000)
    ),
    st.builds(
        lambda rank, nonce, code, end: b"HELLO %d %s %s" % (rank, nonce.hex().encode(), code.hex().encode()) + end,
        st.integers(0, 10**9),
        st.binary(min_size=16, max_size=16),
        st.binary(min_size=16, max_size=16),
        st.sampled_from([b"\n", b"", b"\n\n", b"\r\n"]),
    ),
    st.sampled_from(
        [
            b'{"rank": 2, "kind": "hello", "text": ""}\n',
            b'{"rank": 1, "kind": "failed", "text": "not true"}\n',
            b'{"rank": 0, "kind": "verdict", "text": "[\\"lost\\", \\"not true\\"]"}\n',
            b"[" * 60_000 + b"\n",
        ]
    ),
)
