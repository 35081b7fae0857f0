"""Everything that the subpackage and the commands share: finder, versions, CPU backend, files, checks, reports.

Nothing is imported here, because ``activate.pth`` loads this package at every interpreter start.
"""
