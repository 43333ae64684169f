"""What the types of messages refuse."""

import msgspec
import pytest

from twostroke.messages import CudaMemory, MemoryFile, PoolAddress, TcpEndpoint, encode

UUID = "1b2c3d4e-0000-1111-2222-0123456789ab"
FILE = {"type": "file", "fd": 3}
CUDA = {"type": "cuda", "device": UUID, "handle": "0f" * 64, "offset": 0}
TCP = {"type": "tcp", "host": "10.0.0.1", "port": 9}


def decode(memory: object) -> PoolAddress:
    address = {"host": "h", "pid": 1, "instance": "i", "num_slots": 2, "block_bytes": 8, "memory": memory}
    return msgspec.json.decode(encode(address), type=PoolAddress)


@pytest.mark.parametrize("memory", [MemoryFile(3), CudaMemory(UUID, "0f" * 64, 2**40), TcpEndpoint("fe80::1%eth0", 9)])
def test_an_address_survives_the_wire_and_can_be_a_key(memory: MemoryFile | CudaMemory | TcpEndpoint) -> None:
    address = PoolAddress("h", 1, "i", 2, 8, memory)
    assert msgspec.json.decode(encode(address), type=PoolAddress) == address
    assert {address: 1}[decode(msgspec.to_builtins(memory))] == 1


@pytest.mark.parametrize(
    "memory",
    [
        None,
        {},
        {"fd": 3},  # untagged
        FILE | {"type": "cuda"},
        CUDA | {"type": "file"},
        FILE | {"type": "rdma"},
        FILE | {"fd": -1},
        FILE | {"fd": 2**31},
        FILE | {"offset": 0},
        CUDA | {"fd": 3},
        CUDA | {"handle": "0f" * 65},
        CUDA | {"handle": "0f" * 63},
        CUDA | {"handle": "0g" * 64},
        CUDA | {"handle": "0f" * 64 + "\n"},
        CUDA | {"offset": -1},
        CUDA | {"offset": 2**63},
        CUDA | {"offset": 0.5},
        CUDA | {"device": ""},
        CUDA | {"device": UUID * 2},
        CUDA | {"device": UUID + "\n"},
        CUDA | {"kind": "a memory file"},
        TCP | {"port": 0},
        TCP | {"port": 65536},
        TCP | {"host": ""},
        TCP | {"host": "a name"},
        TCP | {"host": "10.0.0.1\0"},
        TCP | {"host": "é" * 100},
        TCP | {"host": "1" * 46},
        TCP | {"fd": 3},
    ],
)
def test_memory_that_is_not_as_it_should_be(memory: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(memory)
