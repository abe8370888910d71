"""A key of an API: read from the environment, sent to the server, and written nowhere else."""

from __future__ import annotations

import os
import re

from pydantic import SecretStr

from prefopt.errors import PrefoptError

_LONG_ENOUGH = 16  # what is shorter, such as "EMPTY", is a placeholder that may also be a word


class ApiKey:
    """The key in an environment variable; false where the variable is not set.

    Args:
        variable: The variable's name.

    Raises:
        PrefoptError: That is no variable's name, or it holds what cannot be a key.
    """

    def __init__(self, variable: str) -> None:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", variable):  # it may be the key: not repeated
            raise PrefoptError(
                "key_variable: found what is no name of an environment variable; expected a name "
                "like OPENAI_API_KEY, and the key in that variable"
            )
        self.variable = variable
        self._secret = SecretStr(os.environ.get(variable, "").strip())
        if re.search(r"[^!-~]", self._secret.get_secret_value()):
            raise PrefoptError(
                f"the environment variable {variable} holds spaces, line breaks or letters that no "
                "API key has; set it to the key alone"
            )

    def __bool__(self) -> bool:
        return bool(self._secret.get_secret_value())

    def headers(self) -> dict[str, str]:
        """The header that shows the key to the server; none without a key."""
        return {"Authorization": f"Bearer {self._secret.get_secret_value()}"} if self else {}

    def redact(self, text: str) -> str:
        """A message without the key, or words that begin like it: servers echo it half-masked."""
        key = re.escape(self._secret.get_secret_value())
        start = re.escape(self._secret.get_secret_value()[:8])
        return re.sub(rf"{key}|{start}\S*", "[key]", text) if self else text

    def remove(self, text: str) -> str:
        """An answer without the key and otherwise as it was."""
        key = self._secret.get_secret_value()
        return text.replace(key, "[key]") if len(key) >= _LONG_ENOUGH else text
