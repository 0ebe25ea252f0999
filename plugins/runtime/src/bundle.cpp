#include "iq/bundle.h"

#include <algorithm>

#include "files.h"
#include "graph_io.h"
#include "json.h"
#include "manifest.h"

namespace iq
{
namespace
{

constexpr uint64_t kLargestManifest = uint64_t{16} << 20;
constexpr uint64_t kLargestChecksum = 4096;
constexpr size_t kShownDigits = 16;
// Openings of a bundle that is replaced all the time before it is refused.
constexpr int kTries = 20;

// The text of a small file, and its checksum.
std::string readText(FileDescriptor const& folder, std::string const& path, std::string const& name,
    uint64_t limit, std::string* sha256 = nullptr)
{
    std::string found;
    FileDescriptor const file = openFile(folder, name, found);
    if (file.get() < 0)
    {
        throw Refusal(Error{ErrorCode::kBundle,
            path + " is not a bundle, or one of an earlier iq-export: compile the model again",
            {{name, "a file", found}}});
    }
    std::string content;
    std::string const digest = hashFile(file, name, limit, &content);
    if (content.size() > limit)
    {
        throw Refusal(ErrorCode::kBundle, name + " is larger than any that is written");
    }
    if (sha256 != nullptr)
    {
        *sha256 = digest;
    }
    return content;
}

Manifest readManifest(FileDescriptor const& folder, std::string const& path)
{
    std::string digest;
    std::string const text = readText(folder, path, kManifestName, kLargestManifest, &digest);
    std::string const line = readText(folder, path, kChecksumName, kLargestChecksum);
    if (line != digest + "  " + kManifestName + "\n")
    {
        throw Refusal(Error{ErrorCode::kBundle,
            path + " has a manifest that was changed or damaged: copy it or compile it again",
            {{kManifestName, "sha256 " + line.substr(0, kShownDigits),
                "sha256 " + digest.substr(0, kShownDigits)}}});
    }
    return parseManifest(text, path + "/" + kManifestName);
}

// What tells a bundle from the one that replaced it: the checksum of its manifest, or nothing.
std::string generation(std::string const& folder)
{
    Result<std::string> const digest = guarded<std::string>([&]() -> Result<std::string> {
        std::string sha256;
        readText(openFolder(folder), folder, kManifestName, kLargestManifest, &sha256);
        return sha256;
    });
    return digest ? digest.value() : "";
}

std::vector<Mismatch> fileMismatches(FileDescriptor const& folder, Manifest const& manifest)
{
    std::vector<Mismatch> rows;
    for (auto const& [name, record] : manifest.files)
    {
        std::string const expected = std::to_string(record.bytes) + " bytes";
        std::string found;
        FileDescriptor const file = openFile(folder, name, found);
        if (file.get() < 0)
        {
            rows.push_back({name, expected, found});
            continue;
        }
        if (sizeOf(file) != record.bytes)
        {
            rows.push_back({name, expected, std::to_string(sizeOf(file)) + " bytes"});
            continue;
        }
        try
        {
            std::string const digest = hashFile(file, name, record.bytes, nullptr);
            if (digest != record.sha256)
            {
                rows.push_back({name, "sha256 " + record.sha256.substr(0, kShownDigits),
                    "sha256 " + digest.substr(0, kShownDigits)});
            }
        }
        catch (Refusal const& refusal)
        {
            rows.push_back({name, expected, refusal.error.message});
        }
    }
    return rows;
}

std::string namesOf(std::map<std::string, EngineInfo> const& engines)
{
    std::string names;
    for (auto const& [name, engine] : engines)
    {
        names += (names.empty() ? "" : ", ") + name;
    }
    return names.empty() ? "none: iq-export build makes one" : names;
}

// Null, and a row that says why, if `name` is no graph's, or is empty and there are several.
GraphInfo const* chooseGraph(
    Manifest const& manifest, std::string const& name, std::vector<Mismatch>& rows)
{
    std::string names;
    for (GraphInfo const& graph : manifest.graphs)
    {
        if (graph.name == name || (name.empty() && manifest.graphs.size() == 1))
        {
            return &graph;
        }
        names += (names.empty() ? "" : ", ") + graph.name;
    }
    rows.push_back({"graph", name.empty() ? "the name of one" : name, names});
    return nullptr;
}

// Null, and rows that say why, if no engine fits.
EngineInfo const* chooseEngine(GraphInfo const& graph, std::string const& name,
    Machine const& machine, std::vector<Mismatch>& rows)
{
    auto const& engines = graph.engines;
    if (engines.count(name) == 0 && (!name.empty() || engines.empty()))
    {
        rows.push_back({"engine", name.empty() ? "one at least" : name, namesOf(engines)});
        return nullptr;
    }
    std::vector<Mismatch> all;
    for (auto const& [known, engine] : engines)
    {
        if (!name.empty() && known != name)
        {
            continue;
        }
        std::vector<Mismatch> const differing = engineMismatches(engine, machine);
        if (differing.empty())
        {
            return &engine;
        }
        all.insert(all.end(), differing.begin(), differing.end());
    }
    rows.insert(rows.end(), all.begin(), all.end());
    return nullptr;
}

Error noGraph(std::string const& folder, std::vector<Mismatch> const& rows)
{
    return {ErrorCode::kGraph, folder + " has no such graph: give the name of one that it has", rows};
}

std::vector<int64_t> readEos(Node const& root)
{
    std::vector<int64_t> ids;
    // Configurations of models without an end token leave it out or write null.
    if (!root.has("eos_token_id") || root["eos_token_id"].isNull())
    {
        return ids;
    }
    Node const value = root["eos_token_id"];
    auto const add = [&ids](Node const& item) { ids.push_back(item.integer(0, INT32_MAX)); };
    if (value.isList())
    {
        value.eachItem(add);
    }
    else
    {
        add(value);
    }
    return ids;
}

std::string pad(std::string const& text, size_t width)
{
    return text + std::string(width - std::min(width, text.size()) + 2, ' ');
}

} // namespace

std::string printable(std::string const& text)
{
    std::string result;
    for (size_t i = 0; i < text.size(); ++i)
    {
        auto const byte = static_cast<unsigned char>(text[i]);
        auto const next = static_cast<unsigned char>(i + 1 < text.size() ? text[i + 1] : 0);
        bool const c1 = byte == 0xC2U && next >= 0x80U && next < 0xA0U; // in UTF-8
        i += c1 ? 1 : 0;
        result += c1 || byte < ' ' || byte == 0x7FU ? '?' : text[i];
    }
    return result;
}

std::string Error::text() const
{
    std::string result = printable(message);
    if (mismatches.empty())
    {
        return result;
    }
    std::vector<Mismatch> table{{"what", "expected", "found"}};
    size_t first = 0;
    size_t second = 0;
    for (Mismatch const& row : mismatches)
    {
        table.push_back({printable(row.what), printable(row.expected), printable(row.found)});
    }
    for (Mismatch const& row : table)
    {
        first = std::max(first, row.what.size());
        second = std::max(second, row.expected.size());
    }
    for (Mismatch const& row : table)
    {
        result += "\n  " + pad(row.what, first) + pad(row.expected, second) + row.found;
    }
    return result;
}

Bundle::Bundle(std::string folder, Manifest manifest)
    : mFolder(std::move(folder))
    , mManifest(std::move(manifest))
{
}

Result<Bundle> Bundle::openOnce(std::string const& folder, Target const* target)
{
    return guarded<Bundle>([&]() -> Result<Bundle> {
        FileDescriptor const descriptor = openFolder(folder);
        Manifest manifest = readManifest(descriptor, folder);
        std::vector<Mismatch> rows = manifestGaps(manifest);
        std::vector<Mismatch> const files = fileMismatches(descriptor, manifest);
        rows.insert(rows.end(), files.begin(), files.end());
        bool const damaged = !rows.empty();
        GraphInfo const* const graph
            = target != nullptr ? chooseGraph(manifest, target->graph, rows) : nullptr;
        if (graph != nullptr)
        {
            static_cast<void>(chooseEngine(*graph, target->engine, target->machine, rows));
        }
        if (damaged)
        {
            return Error{ErrorCode::kBundle,
                folder + " is not as its manifest says: copy it or compile it again", rows};
        }
        if (target != nullptr && graph == nullptr)
        {
            return noGraph(folder, rows);
        }
        if (!rows.empty())
        {
            return Error{ErrorCode::kEngine, folder + " has no engine for this machine", rows};
        }
        return Bundle(folder, std::move(manifest));
    });
}

Result<Bundle> Bundle::open(std::string const& folder, Target const* target)
{
    std::string before = generation(folder);
    for (int left = kTries;; --left)
    {
        Result<Bundle> result = openOnce(folder, target);
        std::string now = result ? before : generation(folder);
        if (result || left == 0 || now == before)
        {
            return result;
        }
        before = std::move(now); // replaced while it was read
    }
}

Result<GraphInfo const*> Bundle::graph(std::string const& name) const
{
    return guarded<GraphInfo const*>([&]() -> Result<GraphInfo const*> {
        std::vector<Mismatch> rows;
        GraphInfo const* const graph = chooseGraph(mManifest, name, rows);
        if (graph == nullptr)
        {
            return noGraph(mFolder, rows);
        }
        return graph;
    });
}

Result<EngineInfo const*> Bundle::engine(
    GraphInfo const& graph, std::string const& name, Machine const& machine) const
{
    return guarded<EngineInfo const*>([&]() -> Result<EngineInfo const*> {
        std::vector<Mismatch> rows;
        EngineInfo const* const engine = chooseEngine(graph, name, machine, rows);
        if (engine == nullptr)
        {
            return Error{ErrorCode::kEngine, mFolder + " has no engine for this machine", rows};
        }
        return engine;
    });
}

Result<CacheSize> Bundle::cacheSize(GraphInfo const& graph, EngineInfo const& engine) const
{
    return guarded<CacheSize>([&]() -> Result<CacheSize> {
        GraphIo const io = readGraphIo(graph);
        checkProfile(engine);
        return CacheSize{
            static_cast<int64_t>(io.caches.size()), io.bytesPerToken, engine.past.max};
    });
}

Result<std::vector<int64_t>> Bundle::eosIds() const
{
    return guarded<std::vector<int64_t>>([&]() -> Result<std::vector<int64_t>> {
        for (char const* const name : {"generation_config.json", "config.json"})
        {
            if (mManifest.files.count(name) == 0)
            {
                continue;
            }
            Result<std::string> const text = read(name);
            if (!text)
            {
                return text.error();
            }
            std::vector<int64_t> ids = readEos(Document(text.value(), name).root());
            if (!ids.empty())
            {
                return ids;
            }
        }
        return std::vector<int64_t>{};
    });
}

Result<std::string> Bundle::read(std::string const& name) const
{
    return guarded<std::string>([&]() -> Result<std::string> {
        auto const record = mManifest.files.find(name);
        if (record == mManifest.files.end())
        {
            return Error{ErrorCode::kBundle, mFolder + " has no file '" + name + "'"};
        }
        std::string found;
        FileDescriptor const file = openFile(openFolder(mFolder), name, found);
        FileRecord const& expected = record->second;
        std::string content;
        // The size first: nothing is reserved for a file that is not as recorded.
        bool const there = file.get() >= 0 && sizeOf(file) == expected.bytes;
        content.reserve(there ? expected.bytes : 0);
        if (!there || hashFile(file, name, expected.bytes, &content) != expected.sha256)
        {
            return Error{ErrorCode::kBundle, mFolder + "/" + name + " changed while it was in use"};
        }
        return content;
    });
}

std::string Bundle::path(std::string const& name) const
{
    return mFolder + "/" + (liesAhead(openFolder(mFolder), name) ? kAhead : "") + name;
}

} // namespace iq
