"""Whether tokens depend on each other, on their number or on the cache's size: five proofs, one file each."""
