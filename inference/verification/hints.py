"""stub"""


def measured_hints(own, verdict, checks, generator):
    return ()
