"""stub"""


def smallest_counterexample(own, verdict, seed):
    return ""
