// engine/json.h: the JSON type of the engine. Keys keep the order in which they were written.
#pragma once
#include <nlohmann/json_fwd.hpp>

namespace fiedler {

using Json = nlohmann::ordered_json;

}  // namespace fiedler
