"""What went wrong with a file, in a few words, and what may be done about it."""

import errno
import os
import re

SPACE = "Free some space or choose another folder."
REMEDIES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: SPACE,
    errno.EACCES: "Choose a folder that you may write to.",
    errno.EPERM: "Choose a folder that you may write to.",
    errno.EROFS: "Choose a folder that you may write to.",
    errno.ENAMETOOLONG: "Use a shorter name.",
    errno.EIO: "Check the disk.",
}
NUMBER = re.compile(r"\(os error (\d+)\)")  # as the safetensors library reports what the system said


def number_of(error: Exception) -> int | None:
    """The system's number of an error, if it is one of the system's."""
    if isinstance(error, OSError):
        return error.errno
    found = NUMBER.search(str(error))
    return int(found.group(1)) if found else None


def reason(error: Exception) -> str:
    """One line without a full stop at its end."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if (number := number_of(error)) is not None:
        return os.strerror(number)
    return line(error)


def remedy(error: Exception) -> str:
    return REMEDIES.get(number_of(error) or 0, "Choose another path.")


def line(error: BaseException) -> str:
    """The first line of an error's text, with the next one if it ends in a colon, shortened; or the error's name."""
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
    return (text if len(text) <= 200 else f"{text[:200]}...").rstrip(".")
