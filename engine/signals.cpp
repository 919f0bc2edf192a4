#include "engine/signals.h"

#include <unistd.h>

#include <atomic>
#include <stdexcept>

namespace fiedler {

namespace {

std::atomic<int> g_signal{0};
std::atomic<bool> g_installed{false};
static_assert(std::atomic<int>::is_always_lock_free);

// Only what is safe in a signal handler.
extern "C" void on_stop_signal(int signal) {
    const int before = g_signal.exchange(signal);
    if (signal == SIGINT && before == SIGINT) _exit(130);
}

}  // namespace

SignalGuard::SignalGuard() {
    if (g_installed.exchange(true)) throw std::logic_error("signals: two guards at a time");
    g_signal = 0;
    struct sigaction action {};
    action.sa_handler = on_stop_signal;
    sigemptyset(&action.sa_mask);
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, &interrupt_);
    sigaction(SIGTERM, &action, &terminate_);
}

SignalGuard::~SignalGuard() {
    sigaction(SIGINT, &interrupt_, nullptr);
    sigaction(SIGTERM, &terminate_, nullptr);
    g_installed = false;
}

bool stop_requested() { return g_signal != 0; }
int stop_signal() { return g_signal; }

}  // namespace fiedler
