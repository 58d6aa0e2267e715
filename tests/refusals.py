"""What is said by a function that must refuse."""

import pytest

from pskd.errors import PskdError


def refusal(function, *args, **options):
    """The message of its PskdError."""
    with pytest.raises(PskdError) as caught:
        function(*args, **options)
    return str(caught.value)
