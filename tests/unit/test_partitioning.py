"""Keys go where Kafka's own clients put them."""

from __future__ import annotations

from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import strategies as st

from ringfence.kernel.kafka.record import partition_number


@given(st.binary(max_size=80), st.integers(min_value=1, max_value=1024))
def test_a_key_goes_where_the_default_partitioner_puts_it(key: bytes, count: int) -> None:
    assert partition_number(key, count) == DefaultPartitioner()(key, range(count), ())


def test_partition_numbers_equal_those_of_java() -> None:
    """Of the tests of Apache Kafka (`UtilsTest.testMurmur2`), modulo 2^31."""
    for key, hashed in {b"21": -973932308, b"foobar": -790332482, b"abc": 479470107}.items():
        assert partition_number(key, 2**31) == hashed & 0x7FFFFFFF
