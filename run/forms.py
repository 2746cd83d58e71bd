"""Forms: what a value from a file must look like, so that the program may rely on it whoever wrote the file.

A form is a type, which the value must be exactly; a function that returns whether the value fits; a set, of which one
must fit; a list with the form of all items of a list or tuple; or a dict with the form of each entry. In a dict the key
`str` stands for every other string; keys in `Optional` may be missing.
"""

from collections import namedtuple

from command_line.errors import shown

Optional = namedtuple("Optional", "key")

MISSING = object()
PLAIN = frozenset(
    {str, int, float, bool, type(None), lambda value: type(value) is list and set(map(type, value)) == {str}}
)
TEXT = frozenset({str, type(None)})


def any_number(value):
    """The form of a float, NaN and infinity included, and of an int that is exact as one."""
    return type(value) is float or (type(value) is int and abs(value) <= 2**53)


def flat(value):
    """The form of a plain value, of a list or a dict of some, and of a dict of lists: what JSON can hold."""
    return any(misfit(value, form) is None for form in (PLAIN, [PLAIN], {str: PLAIN}, {str: [PLAIN]}))


def whole(low, high=2**53):
    """The form of an int of at least `low` and at most `high`."""
    return lambda value: type(value) is int and low <= value <= high


def real(low=-1e15, high=1e15):
    """The form of a finite number of at least `low` and at most `high`."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def maybe(form):
    """The form of a value that has a form, or is None."""
    return lambda value: value is None or misfit(value, form) is None


def misfit(value, form, where=""):
    """Describe the first place where a value does not have a form, or return None. where: what the value is called.

    The time is at most proportional to the size of the file that the value comes from, whatever is in it.
    """
    if value is MISSING:
        return f"{where} is missing"
    if isinstance(form, dict):
        return _misfit_of_dict(value, form, where)
    if isinstance(form, list):
        if type(value) not in (list, tuple):
            return f"{where} is {shown(value)}"
        misfits = (misfit(item, form[0], f"{where}.{i}") for i, item in enumerate(value))
        return next(filter(None, misfits), None)
    if isinstance(form, (set, frozenset)):
        fits = any(misfit(value, one) is None for one in form)
    else:
        fits = type(value) is form if isinstance(form, type) else form(value)
    return None if fits else f"{where} is {shown(value)}"


def _misfit_of_dict(value, form, where):
    if not isinstance(value, dict):
        return f"{where} is {shown(value)}"
    keys = {getattr(key, "key", key): key for key in form if key is not str}
    for key, written in keys.items():
        if key in value or not isinstance(written, Optional):
            found = misfit(value.get(key, MISSING), form[written], f"{where}.{key}".lstrip("."))
            if found:
                return found
    for key, item in value.items():
        if key not in keys:
            if str not in form or type(key) is not str:
                return f"{where}.{shown(key)} is unknown".lstrip(".")
            found = misfit(item, form[str], f"{where}.{shown(key)}".lstrip("."))
            if found:
                return found
    return None
