"""Progress bars and other output on the screen."""
