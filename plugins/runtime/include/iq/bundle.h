// The output folder of `iq-export compile`, checked before anything in it is used.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "iq/result.h"

namespace iq
{

enum class Flavour
{
    kEnterprise, // libnvinfer
    kRtx         // TensorRT for RTX, libtensorrt_rtx
};

// A TensorRT library or the one a plan was built with: 10.15.1.29; parts not known are 0.
struct TensorRt
{
    Flavour flavour{Flavour::kEnterprise};
    std::array<int32_t, 4> version{};

    IQ_API std::string text() const;
};

// What an engine would run on. What is not set is not compared.
struct Machine
{
    std::optional<TensorRt> tensorRt;
    std::optional<int32_t> computeCapability; // 86 for sm_86
};

struct FileRecord
{
    uint64_t bytes{0};
    std::string sha256;
};

// A graph input or output; an axis is a size or a name (batch, seq, past, total).
struct TensorInfo
{
    std::string name;
    std::string dtype;
    std::vector<std::variant<int64_t, std::string>> shape;
};

struct Range
{
    int64_t min{0};
    int64_t opt{0};
    int64_t max{0};
};

// How the sink ops went into a plan.
enum class Form
{
    kNone,  // the model has none
    kBody,  // standard ops
    kPlugin // layers of plugins/libiq_plugins.so
};

struct EngineInfo
{
    std::string name;
    std::string plan; // relative to the bundle
    TensorRt tensorRt;
    std::vector<int32_t> computeCapabilities;
    Form form{Form::kNone};
    std::string pluginVersion; // of the plugin layers; empty for other forms
    bool pluginEmbedded{false};
    bool versionCompatible{false};
    bool weightsStripped{false};
    Range batch, seq, past;
};

// One graph of a bundle; that of a text model alone is called "model".
struct GraphInfo
{
    std::string name;
    std::vector<TensorInfo> inputs;
    std::vector<TensorInfo> outputs;
    std::map<std::string, EngineInfo> engines;
};

struct Manifest
{
    std::string name;
    std::string recipe;
    std::vector<GraphInfo> graphs; // one at least, each with a name of its own
    std::map<std::string, FileRecord> files;
};

// What a session of an engine keeps for each token of each sequence.
struct CacheSize
{
    int64_t tensors{0};
    int64_t bytesPerToken{0};
    int64_t maxTokens{0};
};

// An engine and a machine that a bundle is opened for.
struct Target
{
    std::string engine; // empty: the one that fits the machine
    Machine machine;
    std::string graph; // empty: the only one
};

// A bundle that was found whole. It never changes once it is open, so threads may share it; the
// folder must not change either while it is in use.
class IQ_API Bundle
{
public:
    // Checks the manifest against its checksum, then every file that it names and every engine, and
    // the engine for `target` if one is given. The Error has a row for everything that differs. A
    // bundle that is replaced or updated meanwhile is read again: it is one or the other, whole.
    static Result<Bundle> open(std::string const& folder, Target const* target = nullptr);

    std::string const& folder() const noexcept
    {
        return mFolder;
    }
    Manifest const& manifest() const noexcept
    {
        return mManifest;
    }

    // The graph of that name, or the only one if none is given; it lives as long as the bundle. The
    // Error has a row with the names of those there are.
    Result<GraphInfo const*> graph(std::string const& name = "") const;

    // The engine of that name, or the first that fits `machine`; it lives as long as the graph. The
    // Error has a row for every difference.
    Result<EngineInfo const*> engine(
        GraphInfo const& graph, std::string const& name, Machine const& machine) const;

    // Fails if the graph is no causal LM with a KV cache.
    Result<CacheSize> cacheSize(GraphInfo const& graph, EngineInfo const& engine) const;

    // The end tokens of generation_config.json, else of config.json; none if neither has one.
    Result<std::vector<int64_t>> eosIds() const;

    // The content of a file that the manifest names, compared with its checksum once more: what is
    // deserialised is what was checked.
    Result<std::string> read(std::string const& name) const;

    // Where a file of the manifest lies, for those that only take a path.
    std::string path(std::string const& name) const;

private:
    Bundle(std::string folder, Manifest manifest);
    static Result<Bundle> openOnce(std::string const& folder, Target const* target);

    std::string mFolder;
    Manifest mManifest;
};

// Facts of this machine for engines of `flavour`, found without linking TensorRT or CUDA: opens
// `library`, or the one of that major version by its usual name. The two texts say why a fact is
// not there.
struct Probe
{
    Machine machine;
    std::string whyNoTensorRt;
    std::string whyNoDevice;
};
IQ_API Result<Probe> probeMachine(
    Flavour flavour, int32_t major, std::string const& library = "", int32_t device = 0);

// The plugin version that this library serves, as plugin layers carry it.
constexpr char const* kPluginVersion = "1";

} // namespace iq
