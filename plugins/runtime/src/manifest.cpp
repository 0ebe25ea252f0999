#include "manifest.h"

#include <algorithm>
#include <set>

#include <nlohmann/json.hpp>

#include "json.h"
#include "schema.h"

namespace iq
{
namespace
{

constexpr int64_t kLargestSize = INT32_MAX; // of an axis

Range readRange(Node const& node, int64_t lowest)
{
    Range range;
    range.min = node["min"].integer(lowest, kLargestSize);
    range.opt = node["opt"].integer(range.min, kLargestSize);
    range.max = node["max"].integer(range.opt, kLargestSize);
    return range;
}

std::vector<TensorInfo> readTensors(Node const& list)
{
    std::vector<TensorInfo> tensors;
    list.eachItem([&tensors](Node const& node) {
        TensorInfo tensor{node["name"].text(), node["dtype"].text(), {}};
        node["shape"].eachItem([&tensor](Node const& axis) {
            if (axis.isText())
            {
                tensor.shape.emplace_back(axis.text());
            }
            else
            {
                tensor.shape.emplace_back(axis.integer(0, kLargestSize));
            }
        });
        tensors.push_back(std::move(tensor));
    });
    return tensors;
}

FileRecord readRecord(Node const& node)
{
    return {static_cast<uint64_t>(node["bytes"].integer(0, INT64_MAX)), node["sha256"].text()};
}

EngineInfo readEngine(std::string const& name, Node const& node, Manifest const& manifest)
{
    EngineInfo engine;
    engine.name = name;
    engine.plan = "engines/" + node["plan"].text();
    FileRecord const record = readRecord(node);
    auto const listed = manifest.files.find(engine.plan);
    if (listed != manifest.files.end()
        && (listed->second.bytes != record.bytes || listed->second.sha256 != record.sha256))
    {
        node.refuse("and the list of files do not tell the same size and checksum of its plan");
    }
    engine.tensorRt.flavour = node["flavour"].text() == "tensorrt"
        ? Flavour::kEnterprise
        : Flavour::kRtx;
    if (!parseVersion(node["tensorrt_version"].text(), engine.tensorRt.version))
    {
        node["tensorrt_version"].refuse("is not a version");
    }
    node["compute_capabilities"].eachItem([&engine](Node const& item) {
        engine.computeCapabilities.push_back(static_cast<int32_t>(item.integer(1, 9999)));
    });
    std::string const& form = node["form"].text();
    engine.form
        = form == "plugin" ? Form::kPlugin : (form == "body" ? Form::kBody : Form::kNone);
    // Earlier versions did not write it; manifestGaps misses it where it is needed.
    engine.pluginVersion = node.has("plugin_version") ? node["plugin_version"].text() : "";
    engine.pluginEmbedded = node["plugin_embedded"].boolean();
    engine.versionCompatible = node["version_compatible"].boolean();
    engine.weightsStripped = node["strip_weights"].boolean();
    Node const profile = node["profile"];
    engine.batch = readRange(profile["batch"], 1);
    engine.seq = readRange(profile["seq"], 1);
    engine.past = readRange(profile["past"], 0);
    return engine;
}

GraphInfo readGraph(Node const& node, Manifest const& manifest)
{
    GraphInfo graph;
    graph.name = node["name"].text();
    graph.inputs = readTensors(node["inputs"]);
    graph.outputs = readTensors(node["outputs"]);
    node["engines"].eachMember([&](std::string const& name, Node const& engine) {
        graph.engines.emplace(name, readEngine(name, engine, manifest));
    });
    return graph;
}

// A manifest of format 1 as one of format 2: what the one graph had at the top is moved, and no
// value is changed, so that the one schema says what each may be.
Json ofFormat1(Json manifest)
{
    Json graph{{"name", "model"}};
    for (char const* const key :
        {"inputs", "outputs", "profile", "engines", "engine_failures", "lifecycles"})
    {
        auto const found = manifest.find(key);
        if (found != manifest.end())
        {
            graph[key] = std::move(*found);
            manifest.erase(found);
        }
    }
    manifest["graphs"] = Json::array();
    manifest["graphs"].push_back(std::move(graph));
    manifest["format_version"] = kFormatVersion;
    return manifest;
}

std::string label(Flavour flavour)
{
    return flavour == Flavour::kRtx ? "TensorRT for RTX" : "TensorRT";
}

} // namespace

std::string TensorRt::text() const
{
    std::string result = label(flavour) + " " + std::to_string(version[0]);
    size_t const parts = version[3] != 0 ? 4 : 3;
    for (size_t i = 1; i < parts; ++i)
    {
        result += "." + std::to_string(version[i]);
    }
    return result;
}

std::string architecture(int32_t computeCapability)
{
    return "sm_" + std::to_string(computeCapability);
}

bool parseVersion(std::string const& text, std::array<int32_t, 4>& version) noexcept
{
    version = {};
    size_t at = 0;
    for (size_t part = 0; part < version.size(); ++part)
    {
        size_t const start = at;
        for (; at < text.size() && text[at] >= '0' && text[at] <= '9'; ++at)
        {
            if (at - start == 8)
            {
                return false;
            }
            version[part] = version[part] * 10 + (text[at] - '0');
        }
        if (at == start)
        {
            return part > 0;
        }
        if (at == text.size() || text[at] != '.')
        {
            break;
        }
        ++at;
    }
    return true;
}

Manifest parseManifest(std::string const& text, std::string const& where)
{
    Document const document(text, where);
    int64_t const format = document.root()["format_version"].integer(INT32_MIN, INT32_MAX);
    if (format != 1 && format != kFormatVersion)
    {
        throw Refusal(Error{ErrorCode::kBundle,
            where + " has another format: compile the model again",
            {{"format version", std::to_string(kFormatVersion), std::to_string(format)}}});
    }
    Json const current = format == 1 ? ofFormat1(document.root().json()) : document.root().json();
    Node const root{current, where};
    checkManifest(root);
    Manifest manifest;
    manifest.name = root["name"].text();
    manifest.recipe = root["recipe"].text();
    root["files"].eachMember([&manifest](std::string const& name, Node const& record) {
        manifest.files.emplace(name, readRecord(record));
    });
    std::set<std::string> names;
    root["graphs"].eachItem([&](Node const& node) {
        GraphInfo graph = readGraph(node, manifest);
        if (!names.insert(graph.name).second)
        {
            root["graphs"].refuse("has the name '" + graph.name + "' twice");
        }
        for (char const* const end : {".onnx", ".onnx.data"})
        {
            if (manifest.files.count(graph.name + end) == 0)
            {
                root["files"].refuse("has no '" + graph.name + end + "'");
            }
        }
        manifest.graphs.push_back(std::move(graph));
    });
    return manifest;
}

std::vector<Mismatch> manifestGaps(Manifest const& manifest)
{
    std::vector<Mismatch> rows;
    auto const need = [&](std::string const& file, std::string const& why) {
        if (manifest.files.count(file) == 0)
        {
            rows.push_back({file, "in the manifest's files, " + why, "not there"});
        }
    };
    for (GraphInfo const& graph : manifest.graphs)
    {
        for (auto const& [name, engine] : graph.engines)
        {
            need(engine.plan, "the plan of engine " + name);
            if (engine.form != Form::kPlugin)
            {
                continue;
            }
            if (!engine.pluginEmbedded)
            {
                need(kPluginName, "for engine " + name);
            }
            if (engine.pluginVersion != kPluginVersion)
            {
                rows.push_back({"engine " + name + ": plugin version", kPluginVersion,
                    engine.pluginVersion.empty() ? "none" : engine.pluginVersion});
            }
        }
    }
    return rows;
}

std::vector<Mismatch> engineMismatches(EngineInfo const& engine, Machine const& machine)
{
    std::vector<Mismatch> rows;
    std::string const prefix = "engine " + engine.name + ": ";
    TensorRt const& built = engine.tensorRt;
    if (engine.weightsStripped)
    {
        rows.push_back({prefix + "weights", "in the plan", "stripped, and nothing here refits it"});
    }
    if (machine.tensorRt)
    {
        TensorRt const& there = *machine.tensorRt;
        // Without the lean runtime, an enterprise plan runs in the very release that built it.
        bool const exact = built.flavour == Flavour::kEnterprise && !engine.versionCompatible;
        size_t const parts = exact ? 3 : 1;
        if (there.flavour != built.flavour)
        {
            rows.push_back({prefix + "TensorRT flavour", built.text(), there.text()});
        }
        else if (!std::equal(
                     built.version.begin(), built.version.begin() + parts, there.version.begin()))
        {
            rows.push_back({prefix + (exact ? "TensorRT version" : "TensorRT major version"),
                built.text(), there.text()});
        }
    }
    auto const& served = engine.computeCapabilities;
    if (machine.computeCapability
        && std::find(served.begin(), served.end(), *machine.computeCapability) == served.end())
    {
        std::string expected;
        for (int32_t const sm : served)
        {
            expected += (expected.empty() ? "" : ", ") + architecture(sm);
        }
        rows.push_back({prefix + "compute capability", expected.empty() ? "none" : expected,
            architecture(*machine.computeCapability)});
    }
    return rows;
}

} // namespace iq
