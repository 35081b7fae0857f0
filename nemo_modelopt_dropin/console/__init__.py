"""Progress bars, and the lines that a person sees on the screen."""
