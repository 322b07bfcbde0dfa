"""The tests. Importing this package, which pytest does first, has every shape checked from here on."""

from tests.shapes import check_every_shape

check_every_shape("bilens")
