"""The one decorator that checks the public edge: jaxtyping shapes, enforced by beartype at every call."""

from beartype import beartype
from jaxtyping import jaxtyped

typed = jaxtyped(typechecker=beartype)
