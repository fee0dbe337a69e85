"""What a row of each kind holds, its checks, and its coding into byte planes."""
