"""From files of problems to training data: what can be graded, once each, in no evaluation set, not too easy.

    rows --collect--> candidates --a stage after the other--> those that stay

Every stage gives each candidate that is left a verdict with a reason; all verdicts together are the audit trail.
"""
