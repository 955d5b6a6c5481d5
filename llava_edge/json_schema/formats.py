"""What `format` of JSON schemas allows, as regular expressions: the texts that programs parse.

By JSON Schema a format need not be followed. LLGuidance follows some, but has the 29th of February in every year, a
year 0, a 61st second and hosts without a dot, which Python and pydantic refuse.
"""

from __future__ import annotations

_YEAR = r"[1-9]\d{3}"
_LEAP_YEAR = r"[1-9]\d(0[48]|[2468][048]|[13579][26])"  # without the few that end in 00
_DAY = (
    rf"({_YEAR}-((0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)|{_LEAP_YEAR}-02-29)"
)
_TIME = r"([01]\d|2[0-3])(:[0-5]\d){2}(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_N = r"\d{1,6}"
_HOURS = f"T({_N}H({_N}M({_N}S)?)?|{_N}M({_N}S)?|{_N}S)"
_LABELS = r"([A-Za-z0-9]+(-[A-Za-z0-9]+)*\.)+[A-Za-z]{2,}"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_GROUP = "[0-9A-Fa-f]{1,4}"
_IPV4 = rf"{_BYTE}(\.{_BYTE}){{3}}"
_IPV6 = (
    f"(({_GROUP}:){{7}}({_GROUP}|:)|:((:{_GROUP}){{1,7}}|:)|({_GROUP}:){{1,6}}:|"
    + "|".join(f"({_GROUP}:){{1,{7 - after}}}(:{_GROUP}){{1,{after}}}" for after in range(1, 7))
    + ")"
)
_UUID = "^[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-V[0-9A-Fa-f]{3}-[89ABab][0-9A-Fa-f]{3}-[0-9A-Fa-f]{12}$"
_HOST = r"([a-z0-9](-?[a-z0-9]){0,15}\.){1,3}[a-z]{2,10}"
FORMATS = {
    "date": f"^{_DAY}$",
    "time": f"^{_TIME}$",  # RFC 3339, section 5.6
    "date-time": f"^{_DAY}T{_TIME}$",
    "duration": f"^P({_N}W|({_N}Y({_N}M({_N}D)?)?|{_N}M({_N}D)?|{_N}D)({_HOURS})?|{_HOURS})$",  # its appendix A
    "uuid": "^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$",
    **{f"uuid{version}": _UUID.replace("V", str(version)) for version in range(1, 9)},  # pydantic's
    "email": rf"^[\w+-]+(\.[\w+-]+)*@{_LABELS}$",
    "hostname": f"^{_LABELS}$",
    "ipv4": f"^{_IPV4}$",
    "ipv6": f"^{_IPV6}$",
    "ipvanyaddress": f"^({_IPV4}|{_IPV6})$",  # pydantic's
    "uri": rf"^https?://{_HOST}(:\d{{1,4}})?(/[\w.~+,:=@/-]{{0,300}}(\?[\w.~+,:=@/&-]{{0,200}})?)?$",
}
