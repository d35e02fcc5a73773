"""What a program costs one rank: products, bytes, communication, and the seconds of these on a measured device."""
