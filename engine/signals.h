// engine/signals.h: SIGINT and SIGTERM ask for a stop at the next step; a second SIGINT ends the process at once, with
// code 130.
#pragma once
#include <csignal>

namespace fiedler {

// While it lives, the two signals set a flag instead of ending the process; then they do again what they did before.
// Only one may live at a time.
class SignalGuard {
  public:
    SignalGuard();
    ~SignalGuard();
    SignalGuard(const SignalGuard&) = delete;
    SignalGuard& operator=(const SignalGuard&) = delete;

  private:
    struct sigaction interrupt_ {
    }, terminate_{};
};

bool stop_requested();
// Which signal asked: SIGINT, SIGTERM or 0.
int stop_signal();

}  // namespace fiedler
