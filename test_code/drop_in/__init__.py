"""Tests as users of the stock subpackage have them: with mocks, and true on stock.

Each class here is imported by the test file of its function, which runs it on our package; ``test_drop_in.py`` runs
the very same classes on stock in a child process. Nothing in this folder may use a name that stock does not have.
"""
