// The check against iq_export/bundle/manifest.schema.json, as iq_export/bundle/schema.py does it.
#pragma once

#include "json.h"

namespace iq
{

// Throws Refusal, naming the place, if `manifest` does not fit.
void checkManifest(Node const& manifest);

} // namespace iq
