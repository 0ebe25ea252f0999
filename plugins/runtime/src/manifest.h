// `manifest.json` as iq_export/bundle/manifest.py writes it.
#pragma once

#include <string>
#include <vector>

#include "iq/bundle.h"

namespace iq
{

constexpr char const* kManifestName = "manifest.json";
constexpr char const* kChecksumName = "manifest.json.sha256";
constexpr char const* kPluginName = "plugins/libiq_plugins.so";
constexpr int64_t kFormatVersion = 2;

// Throws Refusal, naming the field, for anything that is not as the writer leaves it.
Manifest parseManifest(std::string const& text, std::string const& where);

// What the manifest must name for its engines to be loaded, as rows where it does not.
std::vector<Mismatch> manifestGaps(Manifest const& manifest);

// Where an engine and a machine differ.
std::vector<Mismatch> engineMismatches(EngineInfo const& engine, Machine const& machine);

// "sm_86" for 86.
std::string architecture(int32_t computeCapability);

// The numbers of "10.15.1.29"; a suffix ends them, as in engine/trt.py parse_version. False if
// there are none or one is too large.
bool parseVersion(std::string const& text, std::array<int32_t, 4>& version) noexcept;

} // namespace iq
