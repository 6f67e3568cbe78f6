"""One request at a time: lookahead beside lookahead off and other engines."""
