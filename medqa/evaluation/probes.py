"""stub."""


def red_flag(q):
    return "overdose" if "too many" in q else None
