"""Lightning attention: chunked prefill and decode over slots of recurrent state."""
