"""What one version of modelopt writes and another reads: `make test-across` installs the versions and runs it."""
