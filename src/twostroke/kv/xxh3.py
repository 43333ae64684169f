"""The constants of XXH3's 128-bit digest (xxhash.com) of long inputs, for who computes it while bytes are moved.

Eight 64-bit sums take in 64 bytes at a time, a *stripe*: each adds its neighbour's word, and the product of both halves
of its own, combined with the secret, which moves on by 8 bytes a stripe. After each kibibyte they are scrambled. The
last stripe is taken in once more, in whole, and then the sums are merged, in two ways.
"""

import numpy as np

STRIPE = 64  # bytes
SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
        "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
        "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)
PRIME_1, PRIME_2 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F
START = [0xC2B2AE3D, PRIME_1, PRIME_2, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5]
START += [0x9E3779B1]
SCRAMBLE = 128  # where in the secret the keys of a scramble begin
LAST = 121  # those of the last stripe
LOW, HIGH = 11, 117  # and those of both halves of the result
