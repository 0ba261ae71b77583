#pragma once

namespace mamba3::cli {

// For commands that save their work when they are stopped. From the call on, the first Ctrl-C (or
// TERM) only asks to stop; the next ends the program at once.
void catch_stop_signals();
bool stop_asked();  // from any thread
// Ends the program as the signal would have, so that the caller sees that the work is not complete.
// There must have been one.
void end_by_stop_signal();

}  // namespace mamba3::cli
